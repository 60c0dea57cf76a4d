"""Commands as a user runs them, in this process: exit code, output, and the one line of a known error."""

import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import dimefm.cli
from dimefm.cache.disk.durable import digest


class Done(NamedTuple):
    """A command's exit code, standard output and lines of standard error."""

    code: int
    out: str
    lines: list[str]


def run_dimefm(captured: pytest.CaptureFixture, *words: object) -> Done:
    """A command in this process."""
    captured.readouterr()
    argv, sys.argv = sys.argv, ["dimefm", *map(str, words)]
    code = 0
    try:
        dimefm.cli.main()
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    finally:
        sys.argv = argv
    out, err = captured.readouterr()
    return Done(code, out, err.splitlines())


def refused(captured: pytest.CaptureFixture, *words: object) -> str:
    """The one line of a command that ends with a known error."""
    code, _, lines = run_dimefm(captured, *words)
    assert code == 1 and lines[-1].startswith("error: "), lines
    assert not any("Traceback" in line for line in lines), lines
    return lines[-1]


def tree(root: Path) -> dict[str, str]:
    """Digest of every file of a cache but its log, which has times in it."""
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    return {name: digest(path.read_bytes()) for name, path in files.items() if not name.startswith("log/")}
