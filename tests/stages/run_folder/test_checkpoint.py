"""Checkpoints: replaced in one piece, read without running code, damage named in one line."""

import os
import pickle

import pytest
import torch
from torch import nn

from dimefm.cache import CacheError, InputError
from dimefm.stages.run_folder.checkpoint import (
    load_checkpoint,
    load_weights,
    random_state,
    restore_random_state,
    save_checkpoint,
)


def test_a_state_comes_back_equal(tmp_path):
    state = {"step": 7, "model": {"weight": torch.randn(3, 2)}, "optimizer": {"lr": 0.1, "names": ["a"]}}
    save_checkpoint(tmp_path / "run/checkpoint.pt", state)
    found = load_checkpoint(tmp_path / "run/checkpoint.pt")
    assert found["step"] == 7 and found["optimizer"] == state["optimizer"]
    assert (found["model"]["weight"] == state["model"]["weight"]).all()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint.pt"]


def test_a_crash_before_the_rename_leaves_the_old_state(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})

    def crash(*_):
        raise OSError("no power")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(CacheError, match="no power"):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 1


class Trap:
    def __reduce__(self):
        return print, ("code from a checkpoint was run",)


@pytest.mark.parametrize("kept", [0, 10, 300, 0.5, 0.99])
def test_a_cut_file_is_refused(tmp_path, kept):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1, "model": {"weight": torch.randn(100)}})
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if kept < 1 else kept])
    with pytest.raises(InputError, match="not a readable checkpoint; delete it"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "data", [b"\0" * 1000, b"hello", pickle.dumps(Trap(), protocol=2)], ids=["zeros", "text", "pickle"]
)
def test_what_is_no_checkpoint_is_refused_and_none_of_its_code_is_run(tmp_path, capsys, data):
    (tmp_path / "checkpoint.pt").write_bytes(data)
    with pytest.raises(InputError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "checkpoint.pt")
    torch.save(Trap(), tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert capsys.readouterr().out == ""


def test_other_peoples_checkpoints_and_missing_ones_are_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "theirs.pt")
    with pytest.raises(InputError, match="format None, wanted 1"):
        load_checkpoint(tmp_path / "theirs.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(InputError, match="format list, wanted 1"):
        load_checkpoint(tmp_path / "list.pt")
    with pytest.raises(InputError, match="missing; train the student first"):
        load_checkpoint(tmp_path / "absent.pt")


def test_weights_of_another_model_are_refused(tmp_path):
    state = {"model": nn.Linear(3, 4).state_dict()}
    with pytest.raises(InputError, match=r"x\.pt: its weights do not fit") as refused:
        load_weights(nn.Linear(3, 5), state, tmp_path / "x.pt")
    assert "\n" not in str(refused.value)


def test_random_numbers_go_on_where_they_were():
    state = random_state(torch.device("cpu"))
    wanted = torch.rand(5)
    restore_random_state(state, torch.device("cpu"))
    assert (torch.rand(5) == wanted).all()
