"""A frozen open_clip model as the teacher: its own preprocessing, tokenizer and towers, nothing of them changed."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose

from ...cache.disk.durable import digest, to_json
from ...cache.errors import InputError
from ..images.crops import Crop, cut, resample_filter
from ..images.decode import ImageError
from ..settings.models import TeacherSettings
from .checkpoint_states import State
from .frozen_text_tower import text_state, write_text_tower
from .open_clip_towers import in_open_clips_names, load_into_clip
from .plausible import bias_remark, require_finite, require_logit_scale
from .pretrained_tags import quiet_open_clip
from .teacher import basic_identity
from .teacher_source import TeacherSource, find_teacher
from .tokenizer import check_vocabulary, load_tokenizer, tokenize, tokenizer_identity
from .weights_file import one_line, read_weights, weights_digest, weights_errors

MAX_ASPECT = 64
"""Of an image longer than this, in its own widths, only the middle is resized: open_clip's resize would fill gigabytes
with pixels that its crop then throws away."""


class OpenClipTeacher:
    """A frozen open_clip model with its preprocessing and tokenizer: a `Teacher` that keeps its text tower.

    Attributes:
        model: the open_clip model, in evaluation mode.
        model_cfg: its architecture, as in open_clip's model configs.
        notes: what the person who loads it should know, a line each.
    """

    def __init__(self, settings: TeacherSettings, model: Any, model_cfg: Mapping[str, Any], tokenizer: Any) -> None:
        self.settings = settings
        self.model = model.eval().requires_grad_(False)
        self.model_cfg = dict(model_cfg)
        self.tokenizer = tokenizer
        self.embed_dim = int(model_cfg["embed_dim"])
        self.logit_scale = settings.logit_scale or float(self.model.logit_scale.exp())
        self.notes: list[str] = []
        self.device: torch.device = self.model.logit_scale.device
        cfg = PreprocessCfg(**self.model.visual.preprocess_cfg)
        self.preprocess_cfg: dict[str, Any] = {
            key: list(value) if isinstance(value, tuple | list) else value for key, value in vars(cfg).items()
        }
        size = self.preprocess_cfg["size"]
        self.image_size: tuple[int, int] = (size[0], size[1]) if isinstance(size, list) else (size, size)
        # The last two steps are to-tensor and normalise: `normalise` does them for a whole batch, on the device.
        self._crop = Compose(image_transform_v2(cfg, is_train=False).transforms[:-2])
        self._mean, self._std = (
            torch.tensor(value, dtype=torch.float32, device=self.device).view(3, 1, 1) for value in (cfg.mean, cfg.std)
        )

    def crop(self, image: Image.Image) -> NDArray[np.uint8]:
        """Resize and crop one RGB image as open_clip does for this model: (height, width, 3) uint8.

        Raises:
            ImageError: if one side would be left without a pixel.
        """
        width, height = image.size
        longest = MAX_ASPECT * min(width, height)
        if max(width, height) > longest:
            left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
            image = image.crop((left, top, left + min(width, longest), top + min(height, longest)))
        try:
            return np.asarray(self._crop(image))
        except ValueError as error:
            raise ImageError("too narrow to resize") from error

    def view(self, image: Image.Image, crop: Crop) -> NDArray[np.uint8]:
        """A crop of one RGB image, resized to (height, width, 3) uint8 with the model's own filter."""
        height, width = self.image_size
        return cut(image, crop, (width, height), resample_filter(str(self.preprocess_cfg["interpolation"])))

    def normalise(self, crops: Tensor) -> Tensor:
        """(B, height, width, 3) uint8 crops to the model's input, (B, 3, height, width) float32 on its device.

        On a CPU these are the same bits as by open_clip's own transform.
        """
        images = crops.to(self.device, non_blocking=True).permute(0, 3, 1, 2).contiguous().float()
        return images.div_(255).sub_(self._mean).div_(self._std)

    def preprocess(self, image: Image.Image) -> Tensor:
        """One RGB image to (3, height, width) float32 on the teacher's device."""
        return self.normalise(torch.from_numpy(self.crop(image).copy())[None])[0]

    @torch.inference_mode()
    def encode_images(self, images: Tensor) -> Tensor:
        """(B, 3, height, width) float32, as from `normalise`, to (B, D) float32 on the CPU, before normalisation."""
        dtype = open_clip.get_input_dtype(self.settings.precision) or torch.float32
        embeddings: Tensor = self.model.encode_image(images.to(self.device).to(dtype), normalize=False)
        return embeddings.float().cpu()

    def tokenize(self, sentences: Sequence[str]) -> Tensor:
        """(len(sentences), context_length) int64 token ids, on the CPU."""
        return tokenize(self.tokenizer, sentences)

    @torch.inference_mode()
    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """(B, context_length) int64 token ids to (B, D) float32 on the CPU, before normalisation."""
        embeddings: Tensor = self.model.encode_text(tokens.to(self.device, non_blocking=True), normalize=False)
        return embeddings.float().cpu()

    def encode_sentences(self, sentences: Sequence[str]) -> Tensor:
        """Embeddings of sentences, before normalisation: (len(sentences), D) float32 on the CPU."""
        return self.encode_tokens(self.tokenize(sentences))

    def identity(self) -> dict[str, Any]:
        """`basic_identity`, with digests of architecture, weights and tokenizer."""
        return {
            **basic_identity(self),
            "architecture": digest(to_json(self.model_cfg)),
            "weights": weights_digest(self.model.state_dict()),
            "tokenizer": tokenizer_identity(self.tokenizer),
        }

    def save_text_tower(self, folder: Path) -> None:
        """Write text tower, tokenizer and preprocessing into an empty folder; equal teachers give equal bytes."""
        write_text_tower(folder, self.model, self.tokenizer, self.model_cfg, self.preprocess_cfg)

    def text_tower_bytes(self) -> int:
        """About what `save_text_tower` takes on disk."""
        return sum(tensor.numel() * tensor.element_size() for tensor in text_state(self.model).values())


def load_open_clip_teacher(settings: TeacherSettings, device: torch.device) -> OpenClipTeacher:
    """Load the open_clip model that `[teacher]` describes; a local one never touches the network.

    Raises:
        InputError: if it cannot be found, built, filled with its weights or held by the device, or if weights are not
            finite or its logit scale can be none: one line.
    """
    with quiet_open_clip():
        source = find_teacher(settings)
        model = _build(settings, source, device)
        line = _fill(model, source.weights)
        tokenizer = load_tokenizer(source.tokenizer)
    check_vocabulary(tokenizer, getattr(model, "text", model).vocab_size, settings.model)
    require_finite(model, source.weights, settings)
    if settings.logit_scale is None:
        require_logit_scale(model.logit_scale.item(), source.weights)
    else:
        model.logit_scale.data.fill_(math.log(settings.logit_scale))
    try:
        teacher = OpenClipTeacher(settings, model, source.model_cfg, tokenizer)
    except (AssertionError, TypeError, ValueError) as error:
        raise InputError(f"{settings.model}: no such preprocessing: {source.preprocess} ({one_line(error)})") from error
    teacher.notes = [note for note in (line, source.note, bias_remark(model.logit_bias)) if note]
    return teacher


def _fill(model: Any, path: Path) -> str:
    """Fill a model with weights of a file; returns what to say of it."""
    if path.suffix == ".npz":  # big_vision's, which open_clip reads by itself
        with weights_errors(path):
            open_clip.load_checkpoint(model, str(path), strict=True, weights_only=True)
        return ""
    own = model.state_dict()
    num_elements = sum(tensor.numel() for tensor in own.values())

    def share(state: State) -> float:
        try:
            named = in_open_clips_names(model, state)
        except Exception:  # open_clip converts by the names alone: another model's may be anything to it
            return 0.0
        fits = (name for name, tensor in own.items() if name in named and named[name].shape == tensor.shape)
        return sum(own[name].numel() for name in fits) / num_elements

    state, line = read_weights(path, share)
    with weights_errors(path):
        load_into_clip(model, state)
    return line and f"{path}: {line}"


def _build(settings: TeacherSettings, source: TeacherSource, device: torch.device) -> Any:
    try:
        model: Any = open_clip.create_model(
            source.name,
            load_weights=False,
            pretrained_text=False,
            precision=settings.precision,
            device=device,
            force_preprocess_cfg=source.preprocess,
        )
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise InputError(f"{settings.model}: does not fit into the memory of {device}; choose a smaller one") from error
    except Exception as error:  # a config can be wrong in ways that open_clip and timm have no common error for
        raise InputError(f"{settings.model}: open_clip cannot build this model: {one_line(error)}") from error
    # With a timm image tower open_clip casts the scale too, and 100 in bf16 is 98.9.
    for scalar in (model.logit_scale, model.logit_bias):
        if scalar is not None:
            scalar.data = scalar.data.float()
    return model
