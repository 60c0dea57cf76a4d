"""Which devices a setting names, and the one line for those that this machine does not have."""

import pytest
import torch

from dimefm.cache import InputError
from dimefm.stages.devices import devices_of, memory_errors_as, resolve_device


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


def test_full_memory_becomes_the_advice_and_other_errors_pass():
    for error in (MemoryError(), torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        with pytest.raises(InputError, match=r"^lower it$"), memory_errors_as("lower it"):
            raise error
    with pytest.raises(RuntimeError, match="shapes"), memory_errors_as("lower it"):
        raise RuntimeError("shapes do not fit")
