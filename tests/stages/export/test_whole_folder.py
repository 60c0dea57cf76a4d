"""An export is there whole or not at all."""

import json
import os

import pytest

from dimefm.cache import InputError
from dimefm.stages.export.whole_folder import MARK, require_free, whole_folder


def write(path, text):
    with whole_folder(path) as folder:
        (folder / "weights").write_text(text)
        (folder / MARK).write_text(json.dumps({}))


def names(path):
    return sorted(item.name for item in path.parent.iterdir())


def test_a_folder_appears_whole_and_is_replaced_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    write(out, "one")
    write(out, "two")
    assert (out / "weights").read_text() == "two" and names(out) == ["out"]


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), whole_folder(out) as folder:
        (folder / "weights").touch()
        raise KeyboardInterrupt
    assert names(out) == []
    write(out, "one")
    with pytest.raises(KeyboardInterrupt), whole_folder(out):
        raise KeyboardInterrupt
    assert (out / "weights").read_text() == "one" and names(out) == ["out"]


@pytest.mark.parametrize("at", [1, 2])
def test_killed_between_the_renames_the_path_is_whole_or_absent_and_the_next_run_finishes(tmp_path, at):
    out = tmp_path / "out"
    write(out, "one")
    child = os.fork()
    if not child:  # a kill leaves no time for `finally`
        from pathlib import Path

        rename, calls = Path.rename, []

        def dies(self, target):
            calls.append(self)
            if len(calls) == at:
                os._exit(9)
            return rename(self, target)

        Path.rename = dies
        write(out, "two")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not out.exists() or (out / "weights").read_text() == "one"
    write(out, "three")
    assert (out / "weights").read_text() == "three" and names(out) == ["out"]


def test_what_is_no_export_is_refused_and_untouched(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for name in ("mine", "file", "link"):
        with pytest.raises(InputError, match=f"--out .*{name}: (there is a file|a folder that is no export)"):
            require_free(tmp_path / name)
        with pytest.raises(InputError), whole_folder(tmp_path / name):
            raise AssertionError("never entered")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "one")
    assert (tmp_path / "empty" / "weights").exists()
