"""Functions of the user's: found without importing anything, imported when they are wanted, refused in one line."""

import subprocess
import sys

import pytest

from dimefm.cache import InputError
from dimefm.stages.settings.plugins import load_function, require_function

SOURCE = """
raise_on_import = 1 / {divisor}
from functools import partial
from os.path import join as renamed

def function(first, second=2):
    def inner(): ...
    return first, second

if raise_on_import:
    other = partial(function, second=3)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the command is run: a package `mine` whose import fails, and a module `works`."""
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    (tmp_path / "mine" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "mine" / "deep" / "module.py").write_text(SOURCE.format(divisor=0))
    (tmp_path / "works.py").write_text(SOURCE.format(divisor=1))
    (tmp_path / "lazy.py").write_text("def __getattr__(name): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("works", None)


@pytest.mark.parametrize(
    "spec", ["mine.deep.module:function", "works:other", "works:renamed", "lazy:whatever", "math:sqrt"]
)
def test_a_function_is_found_without_importing_its_module_or_the_packages_above(folder, spec):
    require_function(spec, key="a.key")
    assert "mine" not in sys.modules and "works" not in sys.modules


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("works", "a.key: 'works': wanted package.module:function"),
        ("works:a.b", "wanted package.module:function"),
        ("absent.module:function", "a.key: absent.module:function: no module 'absent.module' in "),
        ("works.deeper:function", "no module 'works.deeper'"),
        ("mine.deep.module:inner", r"a.key: .*module.py defines no 'inner'; wanted a function at its top level"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line_with_its_key(folder, spec, message):
    with pytest.raises(InputError, match=message) as refused:
        require_function(spec, key="a.key")
    assert "\n" not in str(refused.value) and isinstance(refused.value, ValueError)


def test_a_function_is_imported_from_the_working_directory(folder):
    assert load_function("works:function", takes=["first"])(first=1) == (1, 2)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("works:absent", r"works:absent: cannot be imported \(.*\); wanted package.module:function"),
        ("absent:function", "cannot be imported"),
        ("works:raise_on_import", "cannot be called as function"),
        ("works:function", r"cannot be called as function\(third=…\)"),
    ],
)
def test_what_cannot_be_imported_or_called_is_refused_in_one_line(folder, spec, message):
    with pytest.raises(InputError, match=message) as refused:
        load_function(spec, takes=["third"])
    assert "\n" not in str(refused.value)


def test_looking_for_a_function_needs_no_torch(folder):
    program = "import sys; from dimefm.stages.settings.plugins import require_function as f; f('torch.nn:Module')"
    subprocess.run([sys.executable, "-c", f"{program}; assert 'torch' not in sys.modules"], check=True)
