"""int8 graphs: weights by channel, ranges from the inputs given, and the layer that int8 ruins stays float, by name."""

import onnx
import pytest
import torch
from torch import nn

from dimefm.stages.export import cpu_features
from dimefm.stages.export.export_job import emitted, smallest_cosine
from dimefm.stages.export.onnx_module import OnnxModule
from dimefm.stages.export.quantise import quantise
from dimefm.stages.export.to_onnx import export_graph


class Ruined(nn.Module):
    """Three layers. With `spread`, what the middle one is given is mostly one huge value: 8 bits leave nothing else."""

    def __init__(self, spread):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 1), nn.Linear(8, 6)
        self.spread = spread

    def forward(self, images):
        x = self.first(images)
        huge = torch.full_like(x[:, :1], self.spread)
        x = torch.cat([x[:, :7], huge], dim=1)
        x = self.middle(x) - self.middle.weight[:, 7] * self.spread if self.spread else self.middle(x)
        return self.last(x.mean(dim=(2, 3)))


def graph_of(tower, tmp_path):
    path = tmp_path / "image.onnx"
    inputs = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    export_graph(tower.eval(), inputs[:2], path)
    return path, inputs


def weights_of(path):
    """Initialisers of 8 bits, and of float32 with more than one dimension."""
    tensors = onnx.load(path).graph.initializer
    of_int8 = [t for t in tensors if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    return of_int8, [t for t in tensors if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1]


def test_weights_become_int8_by_channel_and_the_graph_says_the_same(tmp_path):
    tower = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 8, 2, 2), nn.Flatten(), nn.Linear(32, 6))
    path, inputs = graph_of(tower, tmp_path)
    found = quantise(path, inputs)
    assert found["layers"] == 3 and found["float_layers"] == [] and found["calibration_cosine"] > 0.98
    of_int8, of_float = weights_of(path)
    assert len(of_int8) == 3 and not of_float
    scales = [len(t.dims) and t.dims[0] for t in onnx.load(path).graph.initializer if "scale" in t.name]
    assert 8 in scales  # one for each channel
    others = torch.randn(30, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    assert smallest_cosine(emitted(OnnxModule(path), others), emitted(tower, others)) > 0.95
    assert [item.name for item in tmp_path.iterdir()] == ["image.onnx"]


def test_a_layer_that_int8_ruins_stays_float_and_is_named(tmp_path):
    path, inputs = graph_of(Ruined(3000.0), tmp_path)
    found = quantise(path, inputs)
    assert len(found["float_layers"]) == 1 and found["layers"] == 3, found
    assert found["calibration_cosine"] > 0.98
    of_int8, of_float = weights_of(path)
    assert len(of_int8) == 2 and len(of_float) >= 1
    assert all(name in {node.name for node in onnx.load(path).graph.node} for name in found["float_layers"])


@pytest.mark.parametrize(
    ("text", "instructions", "exact"),
    [
        ("model name\t: Old CPU\nflags\t\t: fpu avx2 fma\n", ["avx2"], False),
        ("model name\t: New CPU\nflags\t\t: avx2 avx512_vnni amx_int8\n", ["avx2", "avx512_vnni", "amx_int8"], True),
        ("Features\t: fp asimddp\n", ["asimddp"], True),
        ("", [], False),
    ],
)
def test_int8_instructions_are_read_from_what_the_system_says(tmp_path, text, instructions, exact):
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    assert cpu_features.int8_instructions(path) == instructions
    assert cpu_features.multiplies_int8_exactly(path) == exact
    assert cpu_features.cpu_name(path)
