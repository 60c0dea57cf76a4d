"""What tests share: a tiny teacher on disk, and a small cache made by hand."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tests run side by side, and so do their processes

from .support.small_cache import STUDENTS, make_cache


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(config .json, weights .safetensors) of a random teacher: embed_dim 32, images of 32 px, 16 tokens."""
    import torch

    from .support.teachers import make_teacher

    torch.set_num_threads(1)  # models this small only lose by more
    return make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A cache made by hand, its images, and students of the user's: (cache, folder)."""
    (tmp_path / "own_students.py").write_text(STUDENTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield make_cache(tmp_path), tmp_path
    sys.modules.pop("own_students", None)
