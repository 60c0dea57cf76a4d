"""A folder goes to the hub as it is, and what the hub refuses is one line."""

import os
import subprocess
import sys

import pytest

from dimefm.cache import InputError
from dimefm.stages.export.hub import require_repo

from ...support.hub import stand_in

PUSH = """
import sys
from pathlib import Path
from dimefm.cache import InputError
from dimefm.stages.export.hub import push
try:
    print(push(Path(sys.argv[1]), "someone/small"))
except InputError as error:
    print(f"refused: {error}")
"""


def pushed(folder, endpoint):
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_none"}
    environment |= {"HF_HOME": str(folder.parent / "home"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PUSH, str(folder)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_every_file_arrives_byte_for_byte_and_a_refusal_keeps_the_folder(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    contents = {"README.md": b"---\nlicense: mit\n---\n", "export.json": b"{}", "big.safetensors": os.urandom(50_000)}
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    with stand_in() as hub:
        line = pushed(folder, hub.endpoint)
        assert line.endswith("/commit/1"), line
        assert hub.repos == ["someone/small"] and hub.files == contents
        hub.refuse = 403
        line = pushed(folder, hub.endpoint)
    assert line.startswith("refused: --push someone/small: the hub did not take") and "\n" not in line
    assert "hf upload someone/small" in line
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents


@pytest.mark.parametrize("name", ["two/slashes/here", "-leading", "a b", ""])
def test_what_is_no_repository_is_refused_before_anything_is_computed(name):
    with pytest.raises(InputError, match="--push"):
        require_repo(name)
    require_repo("someone/small-student.v2")
