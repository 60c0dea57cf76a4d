"""What tests share: a tiny teacher on disk."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(config .json, weights .safetensors) of a random teacher: embed_dim 32, images of 32 px, 16 tokens."""
    import torch

    from .teachers import make_teacher

    torch.set_num_threads(1)  # models this small only lose by more
    return make_teacher(tmp_path_factory.mktemp("teacher"))
