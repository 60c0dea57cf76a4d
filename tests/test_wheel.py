"""A wheel holds the whole package, and works where there is no clone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

from .support.paths import ROOT

IMPORT_ALL = """
import importlib, json, pkgutil, sys
import dimefm
names = sorted(module.name for module in pkgutil.walk_packages(dimefm.__path__, "dimefm."))
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(json.dumps([dimefm.__file__, names]))
"""


SHIPPED = "stages/demo/teacher.safetensors"
"""The one file of the package that is neither code nor metadata."""


def sources() -> set[str]:
    """Module paths of the package in the clone."""
    storeys = [path for storey in ("cache", "stages", "pipeline") for path in (ROOT / storey).rglob("*.py")]
    return {path.relative_to(ROOT).as_posix() for path in [*storeys, *ROOT.glob("*.py")]}


def test_every_module_is_imported_from_a_wheel_outside_the_clone(tmp_path):
    clone, site = tmp_path / "clone", tmp_path / "site"
    for name in [*sources(), SHIPPED, "pyproject.toml", "README.md", "LICENSE", "py.typed"]:
        target = clone / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(clone)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.endswith(".py")}
        archive.extractall(site)
    assert packed == {f"dimefm/{name}" for name in sources()}
    assert (site / "dimefm" / SHIPPED).read_bytes() == (ROOT / SHIPPED).read_bytes()
    assert {path.name for path in site.iterdir()} == {"dimefm", next(site.glob("*.dist-info")).name}

    environment = {**os.environ, "PYTHONPATH": str(site)}  # before the clone, which this environment has installed
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    where, names = json.loads(done.stdout)
    assert Path(where).is_relative_to(site)
    assert len(names) == len(sources()) - 1  # the package itself is not among what lies in it
