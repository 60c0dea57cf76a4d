"""The house: imports run one way, cache knows no model, files stay readable."""

import ast
from pathlib import Path

import pytest

import dimefm

ROOT = Path(dimefm.__file__).parent
ROOMS = ["cache", "stages", "pipeline", "cli"]
"""From the ground up: a room may import those before it, never those after it."""
SOURCES = sorted(path for room in ("cache", "stages", "pipeline") for path in (ROOT / room).glob("*.py"))


def imports(path):
    """(level, module) of every import in a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""
        elif isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_imports_run_from_cli_to_cache_and_never_back(path):
    here = ROOMS.index(path.parent.name)
    for level, module in imports(path):
        room = module.split(".")[0]
        if level == 2 and room in ROOMS:
            assert ROOMS.index(room) < here, f"{path} imports upward: {module}"


def owners(package):
    return {
        f"{path.parent.name}/{path.name}"
        for path in SOURCES
        if any(level == 0 and module.split(".")[0] == package for level, module in imports(path))
    }


def test_one_file_knows_zarr_and_one_knows_faiss():
    assert owners("zarr") == {"cache/arrays.py"}
    assert owners("faiss") == {"cache/index.py"}


def test_the_cache_knows_no_model_library():
    for package in ("torch", "open_clip", "timm", "torchvision"):
        assert not [owner for owner in owners(package) if owner.startswith("cache/")]


def test_no_file_outgrows_its_question():
    long = {path.name: lines for path in SOURCES if (lines := len(path.read_text().splitlines())) > 320}
    assert not long
