"""int8: static ranges of activations, weights by channel; a layer that int8 ruins stays float and is named."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from .cpu_features import multiplies_int8_exactly
from .export_job import emitted
from .onnx_module import OnnxModule

LAYERS = ("Conv", "Gemm", "MatMul")
"""Kinds of nodes whose weights become int8. Products of two activations, as in attention, stay float."""
GOOD_COSINE = 0.98
"""Mean cosine with the float graph that is aimed for, of embeddings less their mean."""
BATCH = 32
CHECKED = 64
"""Inputs, of those for calibration, that layers are judged by."""
_WORTH = 1e-4
"""A layer that costs less than this in mean cosine ruins nothing."""


def quantise(path: Path, inputs: Tensor) -> dict[str, Any]:
    """Replace a float graph by its int8 one.

    Ranges are the least and the largest value that each activation takes. Where the whole graph then has a mean cosine
    below `GOOD_COSINE` with the float one, each layer is tried alone, and those that cost most stay float: one, two,
    four of them, until it is reached, or half of the layers are float.

    Args:
        inputs: (n, ...) of the graph; none of them is scored.

    Returns:
        `layers`, how many there are; `float_layers`, those that stay float; `calibration_cosine`, the mean with the
        float graph on some of the inputs, of embeddings less their mean; `reduced_range`, whether weights have 7 bits.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        prepared = Path(scratch) / "prepared.onnx"
        quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        graph = _Graph(prepared, inputs)
        checked = inputs[:CHECKED]
        wanted = _embeddings(path, checked)
        float_layers: list[str] = []
        cosine = graph.cosine(path, checked, wanted, exclude=float_layers)
        if cosine < GOOD_COSINE:
            costs = graph.costs(path, checked, wanted)
            ruinous = [name for name in sorted(costs, key=lambda name: -costs[name]) if costs[name] > _WORTH]
            count = 1
            while cosine < GOOD_COSINE and ruinous and len(float_layers) < len(graph.layers) // 2:
                float_layers = ruinous[: min(count, len(graph.layers) // 2)]
                cosine = graph.cosine(path, checked, wanted, exclude=float_layers)
                if count >= len(ruinous):
                    break
                count *= 2
    return {
        "layers": len(graph.layers),
        "float_layers": float_layers,
        "calibration_cosine": cosine,
        "reduced_range": graph.reduced,
    }


class _Graph:
    """A float graph with the ranges of its activations."""

    def __init__(self, path: Path, inputs: Tensor) -> None:
        self._path = path
        model = onnx.load(path)
        constants = {tensor.name for tensor in model.graph.initializer}
        self.layers = [
            node.name
            for node in model.graph.node
            if node.op_type in LAYERS and len(node.input) > 1 and node.input[1] in constants
        ]
        calibrator = create_calibrator(
            path,
            list(LAYERS),
            augmented_model_path=str(path.with_name("augmented.onnx")),
            calibrate_method=CalibrationMethod.MinMax,
        )
        calibrator.collect_data(_Reader(model.graph.input[0].name, inputs))
        self._ranges = calibrator.compute_data()
        self.reduced = not multiplies_int8_exactly()

    def write(self, path: Path, layers: Sequence[str]) -> None:
        """Write the graph with these layers in int8."""
        quantizer = QDQQuantizer(
            onnx.load(self._path),
            True,  # weights by channel
            self.reduced,
            QuantType.QInt8,
            QuantType.QUInt8,
            self._ranges,
            list(layers),
            [],
            list(LAYERS),
            {"MatMulConstBOnly": True},
        )
        quantizer.quantize_model()
        quantizer.model.save_model_to_file(str(path), False)

    def cosine(self, path: Path, inputs: Tensor, wanted: NDArray[np.float32], exclude: Sequence[str]) -> float:
        """Write the graph with all layers but some in int8, and return its mean cosine with what is wanted."""
        self.write(path, [name for name in self.layers if name not in exclude])
        return _mean_cosine(_embeddings(path, inputs), wanted)

    def costs(self, path: Path, inputs: Tensor, wanted: NDArray[np.float32]) -> dict[str, float]:
        """What each layer costs in mean cosine, in int8 by itself."""
        found = {}
        for name in self.layers:
            self.write(path, [name])
            found[name] = 1 - _mean_cosine(_embeddings(path, inputs), wanted)
        return found


class _Reader(CalibrationDataReader):
    """Inputs, `BATCH` at a time."""

    def __init__(self, name: str, inputs: Tensor) -> None:
        self._batches: Iterator[Tensor] = iter(inputs.split(BATCH))
        self._name = name

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch.contiguous().numpy()}


def _embeddings(path: Path, inputs: Tensor) -> NDArray[np.float32]:
    module = OnnxModule(path)
    return np.concatenate([emitted(module, batch) for batch in torch.split(inputs, BATCH)])


def _mean_cosine(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Mean cosine of rows once the mean of the wanted ones is taken off both.

    Embeddings of one model share a direction, often most of their length: with it, every cosine is near 1, whatever
    became of what tells them apart.
    """
    found, wanted = found - wanted.mean(axis=0), wanted - wanted.mean(axis=0)
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
    return float(((found * wanted).sum(axis=1) / np.maximum(norms, 1e-12)).mean())
