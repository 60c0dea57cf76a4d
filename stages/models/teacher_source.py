"""Where a teacher comes from: the settings resolved to a model config, a weights file and a tokenizer, or refused."""

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import open_clip
from open_clip.pretrained import download_pretrained_from_hf

from ...cache.disk.durable import digest, to_json
from ...cache.errors import InputError
from ..settings.models import TeacherSettings
from .architectures import model_config, read_model_config
from .preprocessing import CONFIG_NAME, of_images, preprocessing_of_file
from .pretrained_tags import Asked, download, quick_gelu, tag_weights, wrong_activation

HUB, LOCAL = "hf-hub:", "local-dir:"
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".npz")
_WEIGHTS_IN_FOLDER = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
)
_BOTH_TOWERS = ("embed_dim", "vision_cfg", "text_cfg")
_BY_HAND = "give the path of the .safetensors file as teacher.pretrained, or of its folder as model = 'local-dir:…'"


@dataclass(frozen=True)
class TeacherSource:
    """Everything that open_clip needs to build a teacher; whatever had to be fetched is on disk.

    Attributes:
        name: what open_clip knows the architecture by; a config from a file is registered under a name of its own.
        model_cfg: the architecture, as in open_clip's model configs.
        weights: checkpoint with both towers.
        preprocess: image preprocessing; keys as in open_clip's `preprocess_cfg`.
        tokenizer: what `open_clip.get_tokenizer` is asked for.
        note: one line on where the preprocessing comes from, "" where that is plain.
    """

    name: str
    model_cfg: dict[str, Any]
    weights: Path
    tokenizer: str
    preprocess: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def find_teacher(settings: TeacherSettings) -> TeacherSource:
    """Resolve `[teacher]`; downloads what is named by a tag or on the hub, and nothing before the names are checked.

    Images are prepared as `teacher.preprocess` sets, else as the model's or the weights' own config says, the tag, or
    for weights given by path the tags of the architecture.

    Raises:
        InputError: for an unknown architecture or tag, for weights that were trained with another activation than the
            architecture's, for files that are missing, when a download fails, and where nothing says how images are
            prepared.
    """
    given = {} if settings.preprocess is None else settings.preprocess.given
    source = _find(settings)
    said, note = source.preprocess, ""
    if not said:
        said, note = preprocessing_of_file(source.weights, settings.model, source.model_cfg, given)
    return replace(source, preprocess={**said, **given}, note="" if given else note)


def _find(settings: TeacherSettings) -> TeacherSource:
    model, pretrained = settings.model, settings.pretrained
    if model.startswith((HUB, LOCAL)):
        if pretrained:
            raise InputError(f"teacher.pretrained = {pretrained!r}: {model} brings its own weights; remove the key")
        return _from_hub(model) if model.startswith(HUB) else _from_folder(model)
    if model.endswith(".json"):
        model_cfg, preprocess = _read_config(Path(model))
        name = _register(model_cfg)
    else:
        name, preprocess = model.replace("/", "-"), {}
        model_cfg = model_config(model, _BOTH_TOWERS, f"teacher.model = {model!r}")
    if not pretrained:
        raise InputError(
            f"teacher.pretrained: missing; {model} alone is a teacher with random weights: give a tag, hf-hub:… or the "
            "path of a .safetensors file"
        )
    asked = Asked(f"teacher.model = {model!r}", f"teacher.pretrained = {pretrained!r}", _BY_HAND)
    if pretrained.startswith(HUB):
        there = _from_hub(pretrained)
        if quick_gelu(there.model_cfg) != quick_gelu(model_cfg):
            raise wrong_activation(pretrained, pretrained, asked)
        weights, preprocess = there.weights, there.preprocess
    elif pretrained.endswith(WEIGHT_SUFFIXES) or "/" in pretrained:
        weights = Path(pretrained)
        if not weights.is_file():
            raise InputError(f"{weights}: no such file; wanted the teacher's weights (teacher.pretrained)")
    elif model.endswith(".json"):
        raise InputError(
            f"teacher.pretrained = {pretrained!r}: tags belong to open_clip's own architectures; wanted the path of "
            f"the weights for {model}"
        )
    else:
        weights, tag_cfg = tag_weights(name, pretrained, asked)
        preprocess = of_images(tag_cfg)
    return TeacherSource(name, model_cfg, weights, tokenizer=name, preprocess=preprocess)


def _from_hub(model: str) -> TeacherSource:
    repository = model.removeprefix(HUB)
    config = download(
        lambda: download_pretrained_from_hf(repository, filename=CONFIG_NAME), model, repository, _BY_HAND
    )
    weights = download(lambda: download_pretrained_from_hf(repository), model, repository, _BY_HAND)
    model_cfg, preprocess = _read_config(config)
    return TeacherSource(_register(model_cfg), model_cfg, weights, tokenizer=model, preprocess=preprocess)


def _from_folder(model: str) -> TeacherSource:
    folder = Path(model.removeprefix(LOCAL))
    model_cfg, preprocess = _read_config(folder / CONFIG_NAME)
    files = {file.name: file for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES}
    preferred = [files[name] for name in _WEIGHTS_IN_FOLDER if name in files] or list(files.values())
    if not preferred or (len(preferred) > 1 and preferred[0].name not in _WEIGHTS_IN_FOLDER):
        found = ", ".join(sorted(files)) or "none"
        raise InputError(f"{folder}: weights found: {found}; wanted one file, or one called {_WEIGHTS_IN_FOLDER[0]}")
    return TeacherSource(_register(model_cfg), model_cfg, preferred[0], tokenizer=model, preprocess=preprocess)


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model and preprocessing of a config file."""
    model_cfg, preprocess = read_model_config(path, _BOTH_TOWERS, str(path))
    return model_cfg, of_images(preprocess)


def _register(model_cfg: dict[str, Any]) -> str:
    """Make a config known to open_clip under a name that no other config can have, and return that name."""
    name = f"dimefm-{digest(to_json(model_cfg))}"
    if name not in open_clip.list_models():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"{name}.json")
            path.write_bytes(to_json(model_cfg))
            open_clip.add_model_config(path)
    return name
