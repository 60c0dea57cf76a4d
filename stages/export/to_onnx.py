"""ONNX graphs, one for each tower: batches of any size, named inputs, preprocessing written down beside them."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
from torch import Tensor, nn

from ...cache.errors import InputError
from ..models.weights_file import one_line
from .export_job import ONNX_TOLERANCE, Exported, ExportJob, OneTensor, require_same
from .onnx_module import OnnxModule
from .quantise import quantise
from .single_towers import input_facts, write_preprocessing

IMAGE, TEXT = "image.onnx", "text.onnx"
INPUTS = {IMAGE: ("images", "image_embeddings"), TEXT: ("tokens", "text_embeddings")}
"""Names of the input and the output of each graph."""
OPSET = 18
_FILE_LIMIT = 1_900_000_000
"""Bytes of weights from which they lie beside the graph: a protobuf holds 2 GB."""


def write_onnx(job: ExportJob) -> Exported:
    """Write a graph of each tower and hold it, in ONNX Runtime, against the tower.

    Raises:
        InputError: if a tower cannot be exported, or what comes out differs.
    """
    towers = {IMAGE: (OneTensor(job.student), job.example_images(), job.example_images(3))}
    if job.text is not None:
        two = job.text.tokens(["a photo of a goldfish.", "two men stand near a fence"])
        three = job.text.tokens(["", "a red bicycle", "one two three " * 40])
        towers[TEXT] = (OneTensor(job.text.encoder.tower), two, three)
    facts: dict[str, Any] = {"check": {}, "exporter": {}}
    notes = input_facts(job)
    modules, baseline = {}, None
    calibration = job.calibration() if job.precision == "int8" else None
    for name, (tower, example, other) in towers.items():
        kind = name.removesuffix(".onnx")
        path = job.folder / name
        facts["exporter"][kind] = exporter = export_graph(tower, example, path)
        if exporter != "dynamo":
            notes.append(f"torch's dynamo exporter cannot export the {kind} tower; `{name}` is of the older one.")
        in_float = OnnxModule(path)
        facts["check"][kind] = require_same(in_float, tower, other, "fp32", ONNX_TOLERANCE)
        if job.precision == "fp16":
            to_half(path)
            facts["check"][kind] = require_same(OnnxModule(path), tower, other, "fp16", ONNX_TOLERANCE)
        if calibration is not None:
            inputs = calibration.images if name == IMAGE else calibration.tokens
            assert inputs is not None, "sentences come with a text tower"
            facts.setdefault("int8", {})[kind] = found = quantise(path, inputs)
            notes += _float_layers(name, found)
        if job.precision != "fp32" and name == IMAGE:
            baseline = in_float
        modules[name] = OnnxModule(path)
    write_preprocessing(job)
    size = job.image_size
    usage = [
        "import numpy, onnxruntime",
        f'session = onnxruntime.InferenceSession("{IMAGE}")',
        f'(embeddings,) = session.run(None, {{"images": numpy.zeros((1, 3, {size}, {size}), "float32")}})',
    ]
    if calibration is not None:
        facts["int8"] |= {"calibrated_on": calibration.source, "calibration_images": len(calibration.images)}
        facts["int8"]["left_out_as_labelled"] = calibration.left_out
    return Exported(modules[IMAGE], modules.get(TEXT), usage, facts, notes, movable=False, baseline=baseline)


def to_half(path: Path) -> None:
    """Replace a float graph by one that computes in float16; inputs and outputs stay float32.

    Norms stay float32: they sum squares, and ONNX Runtime 1.32 crashes on them in float16 on a CPU.
    """
    blocked = [*DEFAULT_OP_BLOCK_LIST, "LayerNormalization"]
    with _quiet():
        graph = convert_float_to_float16(onnx.load(path), keep_io_types=True, op_block_list=blocked)
    onnx.save(graph, path)


def _float_layers(name: str, found: dict[str, Any]) -> list[str]:
    layers = found["float_layers"]
    if not layers:
        return []
    return [
        f"{len(layers)} of {found['layers']} layers of `{name}` stay float, since int8 ruins them: {', '.join(layers)}."
    ]


def export_graph(tower: nn.Module, example: Tensor, path: Path) -> str:
    """Export a tower as a graph with a dynamic batch.

    Returns:
        `dynamo`, or `torchscript` where torch's dynamo exporter cannot and its older one can.

    Raises:
        InputError: if neither can.
    """
    first, last = INPUTS.get(path.name, INPUTS[IMAGE])
    beside = sum(value.numel() * value.element_size() for value in tower.state_dict().values()) > _FILE_LIMIT
    common: dict[str, Any] = {"input_names": [first], "output_names": [last], "verbose": False}
    dynamo = {"dynamo": True, "dynamic_shapes": ({0: torch.export.Dim("batch")},), "external_data": beside}
    older = {"dynamo": False, "dynamic_axes": {first: {0: "batch"}, last: {0: "batch"}}}
    errors = []
    for name, options in (("dynamo", dynamo), ("torchscript", older)):
        try:
            with _quiet(), torch.no_grad():
                torch.onnx.export(tower.eval(), (example,), str(path), opset_version=OPSET, **common, **options)
                OnnxModule(path)
            return name
        except Exception as error:  # the exporters and the runtime have no error in common
            errors.append(f"{name}: {one_line(error)}")
    raise InputError(f"{path.name}: torch cannot export this tower ({'; '.join(errors)}); take --format torch")


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters print, warn and log; what matters of it is raised."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
