"""Which adapters the page shows: those that were named, and those that ship with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train.adapter.folder import load_adapter
from train.adapter.record import FILES, Adapter
from train.common.console import say
from train.common.errors import AdapterError

SHIPPED = Path(__file__).parents[1] / "adapters"


@dataclass(frozen=True)
class Choice:
    """An adapter, and what it can be measured against.

    Attributes:
        name: on the page; of two folders of one name the later one's has a number.
        adapter: the adapter.
        rivals: other adapters beside it that were scored on the same task and as many rows, best first. There are
            none for an adapter that does not ship: on which rows that was scored is not known.
    """

    name: str
    adapter: Adapter
    rivals: tuple[Adapter, ...]


def choose_adapters(named: Sequence[Path] = (), *, shipped: Path = SHIPPED) -> tuple[Choice, ...]:
    """Load the adapters that were named, in their order, and then those that ship, best first on validation.

    The page starts with the first.

    Args:
        named: adapters' folders.
        shipped: a folder of adapters. Of those that are equally good the first by name comes first.

    Raises:
        AdapterError: one that was named cannot be loaded, or none was and none of those that ship can be.
    """
    # sorted() is stable, so equals stay in the order of their names.
    others = sorted(_load_all(shipped), key=lambda adapter: adapter.scores.key, reverse=True)
    wanted = [load_adapter(folder) for folder in named]
    if not wanted and not others:
        raise AdapterError(f"{shipped} holds no adapter that can be loaded. Name one with --adapter.")
    taken = {adapter.folder.resolve() for adapter in wanted}
    wanted += [adapter for adapter in others if adapter.folder.resolve() not in taken]
    choices: list[Choice] = []
    names: list[str] = []
    for adapter in wanted:
        name = base = adapter.folder.resolve().name
        while name in names:
            name = f"{base} ({names.count(base) + sum(other.startswith(f'{base} (') for other in names) + 1})"
        names.append(name)
        choices.append(Choice(name, adapter, _rivals(adapter, others, shipped)))
    return tuple(choices)


def _rivals(adapter: Adapter, shipped: Sequence[Adapter], folder: Path) -> tuple[Adapter, ...]:
    """The other adapters that ship, if this one does too."""
    if adapter.folder.resolve().parent != folder.resolve():
        return ()
    return tuple(
        other
        for other in shipped
        if other.folder.resolve() != adapter.folder.resolve()
        and (other.task, other.n_validation) == (adapter.task, adapter.n_validation)
    )


def _load_all(folder: Path) -> list[Adapter]:
    """The adapters in a folder by name; of one that cannot be loaded is told why, what is none is passed over."""
    adapters = []
    for path in sorted(folder.iterdir()):
        if not (path / FILES.training).is_file():
            continue
        try:
            adapters.append(load_adapter(path))
        except AdapterError as error:
            say(f"left out: {error}")
    return adapters
