"""Which adapter the page shows: the one that was named, or the best of those that ship with it."""

from dataclasses import dataclass
from pathlib import Path

from train.adapter import FILES, Adapter, load_adapter
from train.console import say
from train.errors import AdapterError

SHIPPED = Path(__file__).parent / "adapters"


@dataclass(frozen=True)
class Choice:
    """An adapter, and what it can be measured against.

    Attributes:
        adapter: what the page shows.
        rivals: other adapters beside it that were scored on the same task and as many rows, best first. There are
            none for an adapter that does not ship: on which rows that was scored is not known.
    """

    adapter: Adapter
    rivals: tuple[Adapter, ...]


def choose_adapter(named: Path | None, *, shipped: Path = SHIPPED) -> Choice:
    """Load the adapter that was named, or else the shipped one with the best score on validation.

    Args:
        named: an adapter's folder.
        shipped: a folder of adapters. Of those that are equally good the first by name is chosen.

    Raises:
        AdapterError: the one that was named cannot be loaded, or none of those that ship.
    """
    if named is not None:
        adapter = load_adapter(named)
        if named.resolve().parent != shipped.resolve():
            return Choice(adapter, ())
        others = [other for other in _load_all(shipped) if other.folder.name != named.resolve().name]
    else:
        others = _load_all(shipped)
        if not others:
            raise AdapterError(f"{shipped} holds no adapter that can be loaded. Name one with --adapter.")
        # Of equals max takes the first.
        adapter = max(others, key=lambda other: other.scores.key)
        others.remove(adapter)
    rivals = [other for other in others if (other.task, other.n_validation) == (adapter.task, adapter.n_validation)]
    return Choice(adapter, tuple(sorted(rivals, key=lambda other: other.scores.key, reverse=True)))


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
