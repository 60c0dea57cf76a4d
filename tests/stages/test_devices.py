"""Which devices a setting names, and the one line for those that this machine does not have."""

import pytest
import torch

from dimefm.cache import InputError
from dimefm.stages.devices import deal_gpu, devices_of, gpu_names, memory_errors_as, resolve_device


@pytest.mark.parametrize(
    ("setting", "num_gpus", "names"),
    [
        ("auto", 0, ["cpu"]),
        ("cpu", 2, ["cpu"]),
        ("auto", 2, ["cuda:0", "cuda:1"]),
        ("cuda", 2, ["cuda:0", "cuda:1"]),
        ("cuda:1", 2, ["cuda:1"]),
    ],
)
def test_a_setting_names_devices(monkeypatch, setting, num_gpus, names):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert [str(device) for device in devices_of(setting)] == names
    assert str(resolve_device(setting)) == names[0]


@pytest.mark.parametrize(("setting", "num_gpus"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_device_that_is_not_here_is_refused(monkeypatch, setting, num_gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    with pytest.raises(InputError, match=f"device = '{setting}': this machine has {num_gpus} GPUs; wanted 'auto'"):
        devices_of(setting)


@pytest.mark.parametrize(
    ("visible", "names"),
    [(None, ["0", "1"]), ("", ["0", "1"]), ("3,1", ["3", "1"]), ("GPU-aa, GPU-bb", ["GPU-aa", "GPU-bb"])],
)
def test_a_gpu_is_called_what_it_is_called_on_its_host(monkeypatch, visible, names):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_names() == names


def test_gpus_are_dealt_one_to_each_and_then_two():
    taken = []
    for _ in range(5):
        taken.append(str(deal_gpu(["0", "1", "2"], taken)))
    assert taken == ["0", "1", "2", "0", "1"]


def test_full_memory_becomes_the_advice_and_other_errors_pass():
    for error in (MemoryError(), torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        with pytest.raises(InputError, match=r"^lower it$"), memory_errors_as("lower it"):
            raise error
    with pytest.raises(RuntimeError, match="shapes"), memory_errors_as("lower it"):
        raise RuntimeError("shapes do not fit")
