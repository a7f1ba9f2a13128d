"""Which adapters the page offers: those that were named, and those that ship with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train.adapter.folder import load_adapter
from train.adapter.record import FILES, Adapter
from train.common.console import say
from train.common.errors import AdapterError
from train.foreign.direct import import_if_foreign

SHIPPED = Path(__file__).parents[1] / "adapters"


@dataclass(frozen=True)
class Choice:
    """An adapter that a visitor can choose."""

    name: str
    """Its folder's name on the page; a number tells folders of one name apart."""
    adapter: Adapter
    rivals: tuple[Adapter, ...]
    """Others that ship and were scored on as many rows of the same task, best first; none if this one does not ship."""


def choose_adapters(
    named: Sequence[Path] = (), base_model: str | None = None, *, shipped: Path = SHIPPED
) -> tuple[Choice, ...]:
    """Load the adapters that were named, in their order, then those that ship, best on validation first.

    ``base_model`` is that of the named ones, as for `load_adapter`.
    """
    # sorted() is stable: equally good adapters stay sorted by name.
    others = sorted(_load_all(shipped), key=lambda adapter: adapter.scores.key, reverse=True)
    wanted = [load_adapter(import_if_foreign(folder, base_model), base_model) for folder in named]
    if not wanted and not others:
        raise AdapterError(f"{shipped} holds no adapter that can be loaded. Name one with --adapter.")
    taken = {adapter.folder.resolve() for adapter in wanted}
    wanted += [adapter for adapter in others if adapter.folder.resolve() not in taken]
    choices: dict[str, Choice] = {}
    for adapter in wanted:
        name = base = adapter.folder.resolve().name
        number = 1
        while name in choices:
            number += 1
            name = f"{base} ({number})"
        choices[name] = Choice(name, adapter, _rivals(adapter, others, shipped))
    return tuple(choices.values())


def _rivals(adapter: Adapter, shipped: Sequence[Adapter], folder: Path) -> tuple[Adapter, ...]:
    """The comparable adapters that ship, if this one does too."""
    own = adapter.folder.resolve()
    if own.parent != folder.resolve():
        return ()
    comparable = (adapter.task, adapter.n_validation)
    return tuple(
        other for other in shipped if other.folder.resolve() != own and (other.task, other.n_validation) == comparable
    )


def _load_all(folder: Path) -> list[Adapter]:
    """The adapters in a folder, by name. Prints why one cannot be loaded; skips what is no adapter."""
    adapters = []
    for path in sorted(folder.iterdir()):
        if not (path / FILES.training).is_file():
            continue
        try:
            adapters.append(load_adapter(path))
        except AdapterError as error:
            say(f"left out: {error}")
    return adapters
