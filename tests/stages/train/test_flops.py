"""A step's FLOPs are what one counts by hand, and counting them leaves the training as it is."""

import json
import re

import pytest
import torch
from torch import nn

from dimefm.stages.settings.distill import DistillSettings, LossSettings
from dimefm.stages.settings.models import StudentSettings
from dimefm.stages.train.flops import PEAKS, flop_metrics, forward_flops, peak_flops_per_s
from dimefm.stages.train.processes import World

from ...support.training import train_one

SETTINGS = DistillSettings(
    epochs=1, batch_images=9, batch_sentences=0, log_every=1, device="cpu", workers=1, loss=LossSettings(feature=1.0)
)


def test_a_convolution_and_a_matrix_cost_two_operations_for_each_product():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 16))
    by_hand = 2 * (8 * 4 * 4 * 3 * 3 * 3 + 8 * 16 * 16)
    assert forward_flops(model, torch.zeros(1, 3, 8, 8)) == by_hand


def test_attention_is_counted_whatever_kernel_would_run_it():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    rows, width = 10, 16
    projections, attention, feed_forward = 4 * rows * width * width, 2 * rows * rows * width, 2 * rows * width * 32
    assert forward_flops(layer, torch.zeros(1, rows, width)) == 2 * (projections + attention + feed_forward)


def test_counting_leaves_weights_statistics_and_random_numbers_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    forward_flops(model, torch.ones(1, 3, 8, 8))
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_that_cannot_be_run_alone_has_no_number():
    assert forward_flops(nn.Linear(3, 4), torch.zeros(1, 5)) is None
    assert flop_metrics(0, 1.0, "fp32", World(torch.device("cpu"))) == {}


@pytest.mark.parametrize(
    ("gpu", "precision", "tf32", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", True, 312e12),
        ("NVIDIA A100-PCIE-40GB", "fp32", True, 156e12),
        ("NVIDIA A100-PCIE-40GB", "fp32", False, 19.5e12),
        ("NVIDIA H100 80GB HBM3", "bf16", True, 989.4e12),
        ("NVIDIA H100 PCIe", "bf16", True, 756e12),
        ("NVIDIA H200", "fp16", True, 989.4e12),
        ("NVIDIA L4", "bf16", True, 121e12),
        ("NVIDIA L40S", "bf16", True, 362e12),
        ("Tesla V100-SXM2-16GB", "fp16", True, 125e12),
        ("Tesla V100-SXM2-16GB", "bf16", True, None),
        ("Tesla V100-SXM2-16GB", "fp32", True, 15.7e12),
        ("Tesla T4", "fp16", True, 65e12),
        ("NVIDIA A10", "bf16", True, 125e12),
        ("NVIDIA GeForce RTX 3090", "fp16", True, 71e12),
        ("NVIDIA GeForce RTX 3090 Ti", "fp16", True, None),
        ("NVIDIA GeForce RTX 4090 D", "fp16", True, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", True, None),
        ("NVIDIA Z900", "bf16", True, None),
    ],
)
def test_the_peak_is_that_of_the_gpu_and_the_format(gpu, precision, tf32, peak):
    assert peak_flops_per_s(gpu, precision, tf32=tf32) == peak


def test_no_name_fits_two_gpus_of_the_table():
    names = ["NVIDIA B200", "NVIDIA H200", "NVIDIA H100 NVL", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "NVIDIA A40"]
    names += ["NVIDIA RTX A6000", "NVIDIA L40S", "NVIDIA L4", "NVIDIA A10", "NVIDIA A30", "Tesla T4"]
    for name in names:
        assert sum(bool(re.search(rf"\b(?:{pattern})", name)) for pattern in PEAKS) == 1, name


def test_utilisation_is_of_all_devices_of_the_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    world = World(torch.device("cuda", 0), 0, 4)
    metrics = flop_metrics(156 * 10**12, 0.5, "bf16", world)
    assert metrics == {"flops_per_s": pytest.approx(312e12), "flop_utilisation": pytest.approx(0.25)}


def test_every_logged_line_has_them_where_they_are_known(world):
    cache, folder = world
    student = StudentSettings(model="own_students:with_dropout", image_size=8)
    train_one(cache, folder / "images", student, SETTINGS, folder / "run")
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    flops = 3 * 9 * 2 * (8 * 4 * 4 * 3 * 3 * 3 + 8 * 16 * 16)
    assert lines and all(line["flops_per_s"] == pytest.approx(flops / line["step_s"]) for line in lines)
    assert not any("flop_utilisation" in line for line in lines)  # nobody knows the peak of a CPU
