"""The rooms of the house: which may import which, and that none grows beyond what a reader keeps in mind."""

import ast
from collections.abc import Iterator
from functools import cache

from tests.conftest import ROOT

ARROWS = {
    # train: a prompt is learned
    "train.common": "",
    "train.config": "train.common",
    "train.data": "train.common train.config",
    "train.untrusted": "train.common",
    "train.model": "train.untrusted train.common train.config train.data",
    "train.adapter": "train.common train.untrusted train.config train.data train.model",
    "train.fit": "train.common train.config train.data train.model train.adapter",
    "train.foreign": "train.common train.config train.untrusted train.data train.model train.adapter train.fit",
    "train.import_peft": "train.common train.foreign",
    "train.evaluate": "train.common train.data train.model train.adapter train.fit",
    "train.__main__": "train.common train.config train.data train.fit",
    # export: an adapter becomes a bundle, and a bundle answers
    "export.bundle": "train.common train.untrusted train.config train.data train.model",
    "export.runtime": "train.common train.config train.data export.bundle",
    "export.fold": "train.common train.config train.data train.model train.adapter train.foreign export.bundle export.runtime",
    "export.ray_cluster": "train.common",
    "export.score": "train.common train.config train.data export.bundle export.runtime export.ray_cluster",
    "export.serve": "train.common train.config train.data export.bundle export.runtime export.ray_cluster",
    "export.bench": "train.common train.untrusted train.config train.data train.model train.adapter export.bundle export.runtime export.fold",
    "export.triton": "train.common export.bundle export.runtime",
    "export.__main__": "train.common export.fold",
    # demo: the page
    "demo.access": "train.common",
    "demo.engines": "train.common train.data train.adapter train.foreign export.bundle export.runtime export.fold export.serve",
    "demo.measure": "train.common train.config train.data train.model train.adapter export.bundle export.runtime export.score "
    "demo.access demo.engines",
    "demo.page": "train.common train.config train.data train.adapter export.bundle export.runtime demo.access demo.engines "
    "demo.measure",
    "demo.starting_page": "demo.page",
    "demo.__main__": "train.common export.serve demo.access demo.engines demo.page demo.starting_page",
    "demo.space": "demo.__main__",
}
"""Each room, or file beside the rooms, and what it may import of ours. Written from below to above: no arrow turns round."""

STAGES = ("train", "export", "demo")


@cache
def modules() -> dict[str, ast.Module]:
    """Every file of the product, parsed, by its module's name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
            path.read_text("utf-8")
        )
        for stage in STAGES
        for path in (ROOT / stage).rglob("*.py")
    }


def imports(tree: ast.Module) -> Iterator[str]:
    """Names of the modules that a file imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (name for alias in node.names if (name := f"{node.module}.{alias.name}") in modules())


def room_of(module: str) -> str:
    """ "train.data" of "train.data.tasks"."""
    return ".".join(module.split(".")[:2])


def test_every_arrow_between_rooms_is_declared() -> None:
    found = {
        (room_of(module), room)
        for module, tree in modules().items()
        for name in imports(tree)
        if (room := room_of(name)) != room_of(module) and name.partition(".")[0] in (*STAGES, "tests") and "." in name
    }
    declared = {(room, other) for room, others in ARROWS.items() for other in others.split()}
    assert found - declared == set()
    assert declared - found == set(), "declared, and not there any more"
    order = list(ARROWS)
    assert [(room, other) for room, other in declared if order.index(other) >= order.index(room)] == []


def test_no_file_imports_itself_by_way_of_others() -> None:
    graph = {module: {name for name in imports(tree) if name in modules()} for module, tree in modules().items()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " → ".join((*way[way.index(module) :], module))
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*way, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_no_room_file_or_function_grows_beyond_what_a_reader_keeps_in_mind() -> None:
    """At most ten files in a room (and __init__), 400 lines in a file, 60 in a function."""
    folders = {path.parent for stage in STAGES for path in (ROOT / stage).rglob("*.py")}
    files = {folder: [path for path in folder.glob("*.py") if path.name != "__init__.py"] for folder in folders}
    assert {str(folder): len(paths) for folder, paths in files.items() if len(paths) > 10} == {}
    lines = {str(path): len(path.read_text("utf-8").splitlines()) for paths in files.values() for path in paths}
    assert {path: count for path, count in lines.items() if count > 400} == {}
    long = {
        f"{module}.{node.name}": node.end_lineno - node.lineno + 1
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    }
    assert {name: count for name, count in long.items() if count > 60} == {}
