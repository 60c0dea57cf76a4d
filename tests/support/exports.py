"""Exports as others load them: in a process of its own, without this package, offline, with an empty cache."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dimefm.stages.export.export_job import CalibrationData, ExportJob
from dimefm.stages.export.text_side import TextSide
from dimefm.stages.models.image_student import build_student
from dimefm.stages.models.text_encoder import TextEncoder
from dimefm.stages.models.text_student import build_text_student, text_student_cfg, text_tokenizer

CPU = torch.device("cpu")
PREPROCESS = {
    "size": [24, 24],
    "mode": "RGB",
    "mean": [0.5, 0.4, 0.3],
    "std": [0.3, 0.3, 0.2],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}

WITHOUT_DIMEFM = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "dimefm":
            raise ImportError(f"{name}: there is no such package here")

sys.meta_path.insert(0, Blocked())
"""


def elsewhere(script: str, folder: Path, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run a script that has a dict of `inputs` and fills one of `outputs`; in a folder, without dimefm."""
    save_file({name: value.contiguous() for name, value in inputs.items()}, folder.parent / "inputs.safetensors")
    results = str(folder.parent / "outputs.safetensors")
    whole = f"""{WITHOUT_DIMEFM}
from safetensors.torch import load_file, save_file
inputs, outputs = load_file({str(folder.parent / "inputs.safetensors")!r}), {{}}
import torch
torch.set_grad_enabled(False)
{script}
save_file({{name: value.contiguous() for name, value in outputs.items()}}, {results!r})
"""
    (folder.parent / "script.py").write_text(whole)
    empty = folder.parent / "empty-home"
    empty.mkdir(exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(empty), "HOME": str(empty), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(folder.parent / "script.py")], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(empty.rglob("*.safetensors"))
    return load_file(folder.parent / "outputs.safetensors")


def code_of(card: Path) -> list[str]:
    """The lines of Python in a model card."""
    return card.read_text().split("```python\n")[1].split("```")[0].splitlines()


def text_of(folder: Path, *, seed: int = 1, owner: str = "teacher", embed_dim: int = 16, **config: Any) -> TextSide:
    """A tiny text tower of open_clip's own; `config` are keys of the model config beside `text_cfg`."""
    text = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    path = folder / f"text-{seed}.json"
    path.write_text(json.dumps({"embed_dim": embed_dim, "text_cfg": text, **config}))
    torch.manual_seed(seed)
    tower = build_text_student(str(path), embed_dim)
    return TextSide(owner, TextEncoder(tower, text_tokenizer(str(path)), CPU), text_student_cfg(str(path), embed_dim))


def job_of(
    folder: Path,
    model: str,
    *,
    image_size: int = 32,
    precision: str = "fp32",
    text: TextSide | None = None,
    embed_dim: int = 16,
    seed: int = 0,
    resize_mode: str = "shortest",
) -> ExportJob:
    """An export of a student with random weights, whose batch norms have seen some images."""
    torch.manual_seed(seed)
    student = build_student(model, embed_dim, image_size)
    student.train()
    with torch.no_grad():
        for _ in range(3):
            student(torch.randn(8, 3, image_size, image_size))
    record = {
        "name": "small",
        "student": {"small": {"model": model, "image_size": image_size, "text": "teacher"}},
        "embed_dim": embed_dim,
        "preprocess": {**PREPROCESS, "resize_mode": resize_mode},
    }
    (folder / "out").mkdir(exist_ok=True)
    images = torch.randn(24, 3, image_size, image_size)
    data = CalibrationData(images, text.tokens([f"picture {i}" for i in range(24)]) if text else None, "noise")
    return ExportJob(student.eval(), record, text, 14.5, folder / "out", precision, lambda: data, print)
