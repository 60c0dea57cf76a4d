"""torch.export programs, one for each tower: `torch.export.load` runs them where neither open_clip nor timm is."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ...cache.errors import InputError
from ..models.weights_file import one_line
from .export_job import ONNX_TOLERANCE, Exported, ExportJob, OneTensor, require_same
from .single_towers import input_facts, write_preprocessing

IMAGE, TEXT = "image.pt2", "text.pt2"


def write_torch(job: ExportJob) -> Exported:
    """Write a program of each tower, with a batch of any size, and open them."""
    check = {}
    image = _write(job, job.student, job.example_images(), IMAGE)
    check["image"] = require_same(image, job.student, job.example_images(3), job.precision, ONNX_TOLERANCE)
    text = None
    if job.text is not None:
        tower = OneTensor(job.text.encoder.tower)
        text = _write(job, tower, job.text.tokens(["a photo", "two"]), TEXT)
        three = job.text.tokens(["a photo of a goldfish.", "two men stand near a fence", ""])
        check["text"] = require_same(text, tower, three, job.precision, ONNX_TOLERANCE)
    write_preprocessing(job)
    size = job.image_size
    usage = [
        "import torch",
        f'image = torch.export.load("{IMAGE}").module()',
        f"embeddings = image(torch.zeros(1, 3, {size}, {size}))",
    ]
    return Exported(image, text, usage, {"check": check}, input_facts(job), movable=False)


def _write(job: ExportJob, tower: nn.Module, example: Tensor, name: str) -> nn.Module:
    path = job.folder / name
    module = HalfPrecision(copy.deepcopy(tower)) if job.precision == "fp16" else tower
    dynamic: tuple[Any, ...] = ({0: torch.export.Dim("batch")},)
    try:
        with torch.no_grad():
            program = torch.export.export(module, (example,), dynamic_shapes=dynamic)
    except Exception as error:  # what torch.export cannot trace has no error in common
        raise InputError(
            f"{name}: torch.export cannot take this tower ({one_line(error)}); take --format onnx"
        ) from error
    torch.export.save(program, path)
    loaded: nn.Module = torch.export.load(path).module()
    return Program(loaded)


class HalfPrecision(nn.Module):
    """A tower that computes in float16 and speaks float32."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower.half()

    def forward(self, inputs: Tensor) -> Tensor:
        embeddings: Tensor = self.tower(inputs.half() if inputs.is_floating_point() else inputs)
        return embeddings.float()


class Program(nn.Module):
    """A loaded program, which refuses `eval()`."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self._run = [program]  # in a list, so that it is no submodule

    def forward(self, inputs: Tensor) -> Tensor:
        embeddings: Tensor = self._run[0](inputs)
        return embeddings
