"""The house: imports run one way, on every floor; cache knows no model; files stay readable; names lead to one room."""

import ast
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import dimefm

ROOT = Path(dimefm.__file__).parent
FLOORS = {
    "cache": ["errors", "disk", "version", "reader", "audit"],
    "stages": [
        *("devices", "counter_random", "profiling", "settings", "images", "inputs", "models"),
        *("embed", "retrieve", "sample", "losses", "load", "run_folder", "score", "export"),
        *("train", "demo"),
        *("feature_losses", "view_losses"),
    ],
    "pipeline": ["progress", "config", "stage_one", "stage_two", "exporting", "row_masks", "upkeep", "demo"],
}
"""Rooms of each storey, from the ground up: one may import those before it, never those after it."""
STOREYS = [*FLOORS, "cli"]
SOURCES = sorted(path for storey in FLOORS for path in (ROOT / storey).rglob("*.py"))
SHARED_NAMES = {
    "distill.py": "the command and its settings",
    "inspect.py": "the command, and what it reads of a cache",
    "select.py": "the command, and how sentences are chosen",
    "verify.py": "the command, and the checks on disk",
}
"""File names that stand in two rooms by intent: a command and its part below."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[list[str]]:
    """Absolute module paths of every import in a file, those inside functions too."""
    package = ["dimefm", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            base = package[: len(package) - node.level + 1] if node.level else []
            for alias in node.names:
                target = [*base, *module, alias.name]
                is_module = base and ROOT.joinpath(*target[1:]).with_suffix(".py").exists()
                yield target if is_module else target[:-1]


def place(module: list[str]) -> tuple[int, int]:
    """(storey, room) of a module; -1 for a room that is the storey's own `__init__`."""
    storey = STOREYS.index(module[1])
    room = FLOORS[module[1]].index(module[2]) if module[1] in FLOORS and len(module) > 2 else -1
    return storey, room


def inner_imports(path: Path) -> Iterator[list[str]]:
    yield from (module for module in imports(path) if module[0] == "dimefm" and len(module) > 1)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_run_downward_on_every_floor(path):
    if path.parent.parent == ROOT:
        return  # re-exports of a storey look up into its rooms, and nobody below looks at them
    here = place(["dimefm", *path.relative_to(ROOT).with_suffix("").parts])
    for module in inner_imports(path):
        assert place(module) <= here, f"{name_of(path)} imports upward: {'.'.join(module)}"


def test_no_circle_of_imports_inside_a_room():
    graph = defaultdict(set)
    for path in SOURCES:
        here = ".".join(["dimefm", *path.relative_to(ROOT).with_suffix("").parts])
        graph[here] |= {".".join(module) for module in inner_imports(path)}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*above, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def owners(package: str) -> set[str]:
    return {name_of(path) for path in SOURCES if any(module[0] == package for module in imports(path))}


def test_one_file_knows_zarr_and_one_knows_faiss():
    assert owners("zarr") == {"cache/disk/arrays.py"}
    assert owners("faiss") == {"cache/disk/index.py"}


def test_the_cache_knows_no_model_library():
    for package in ("torch", "open_clip", "timm", "torchvision"):
        assert not [owner for owner in owners(package) if owner.startswith("cache/")]


def test_upkeep_uses_the_guards_and_inputs_of_stage_one_and_not_its_command():
    commands = {("stage_one", "cache_teacher"), ("stage_two", "distill"), ("stage_two", "evaluate")}
    for path in SOURCES:
        if name_of(path).startswith("pipeline/upkeep/"):
            found = {tuple(module[2:4]) for module in inner_imports(path) if module[1] == "pipeline"}
            assert not found & commands, f"{name_of(path)} imports a command"


def test_no_file_outgrows_its_question():
    long = {name_of(path): lines for path in SOURCES if (lines := len(path.read_text().splitlines())) > 320}
    assert not long


def test_a_file_name_leads_to_one_room():
    rooms = defaultdict(list)
    for path in SOURCES:
        rooms[path.name].append(name_of(path))
    del rooms["__init__.py"]
    assert {name for name, paths in rooms.items() if len(paths) > 1} == set(SHARED_NAMES), rooms


def test_only_re_exports_stand_in_an_init():
    full = {name_of(path) for path in SOURCES if path.name == "__init__.py" and path.read_text().strip()}
    full -= {f"{storey}/__init__.py" for storey in FLOORS}
    assert full == {"stages/losses/__init__.py"}


def test_the_packages_that_are_installed_are_those_of_the_tree():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in SOURCES}
    assert sorted(listed) == sorted(["dimefm", *(".".join(["dimefm", *folder.parts]) for folder in folders)])


def test_every_folder_of_the_package_has_tests_in_a_folder_of_its_name():
    tests = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    rooms = {path.parent.relative_to(ROOT) for path in SOURCES}
    assert tests - {Path()} <= rooms


def test_the_architecture_page_names_files_and_rooms_that_exist():
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`((?:cache|stages|pipeline|tests)/[\w/]+(?:\.py|/)?)`", page))
    assert len(named) > 15 and not [name for name in named if not (ROOT / name).exists()]
    described = set(re.findall(r"^- \*\*(\w+)\*\*", page, re.MULTILINE))
    rooms = {path.parent.name for path in SOURCES if path.parent.parent.parent == ROOT}
    assert described == rooms


def test_the_tree_in_the_readme_is_the_tree():
    text = (ROOT / "README.md").read_text()
    tree = text[text.index("cli.py   ") :].split("```")[0]
    listed = set(re.findall(r"^(\w+)/ |^  (\w+)/ ", tree, re.MULTILINE))
    names = {name for pair in listed for name in pair if name}
    assert names >= {path.parent.name for path in SOURCES if path.parent.parent.parent == ROOT} | set(FLOORS)
    assert not [name for name in names if not any(path.is_dir() for path in [ROOT / name, *ROOT.glob(f"*/{name}")])]
