"""The view of an image that a student sees: a random resized crop, perhaps mirrored, as a function of its key.

The random numbers come from `counter_random.uniforms(key, row, pass)`, so a view depends on nothing but the run's seed,
the image's row and how often it was seen before: not on threads, not on where a run was resumed.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from .images import decode_image
from .settings import AugmentSettings

_TRIES = 10
_LARGE_BYTES = 32 * 1024
"""Files below this are too small to be worth a look at their size before they are decoded."""
NUM_UNIFORMS = 2 * _TRIES + 3
"""Random numbers that one view takes at most: area and shape of ten tries, the position, the flip."""

Box = tuple[int, int, int, int]


def crop_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], numbers: Sequence[float]
) -> Box:
    """Choose a crop with the distribution of torchvision's `RandomResizedCrop.get_params`.

    Args:
        width, height: of the image, pixels.
        scale: range of the crop's share of the area.
        ratio: range of the crop's width / height, drawn log-uniformly.
        numbers: `NUM_UNIFORMS` uniform numbers in [0, 1).

    Returns:
        (left, top, right, bottom), pixels, inside the image and never empty. If no try fits, the largest centred crop
        whose shape is in range.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    left_number, top_number = numbers[2 * _TRIES : 2 * _TRIES + 2]
    for area_number, shape_number in zip(numbers[0 : 2 * _TRIES : 2], numbers[1 : 2 * _TRIES : 2]):
        area = width * height * (scale[0] + area_number * (scale[1] - scale[0]))
        shape = math.exp(low + shape_number * (high - low))
        crop_width, crop_height = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(left_number * (width - crop_width + 1))
            top = int(top_number * (height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    crop_width = min(width, max(1, round(height * ratio[1])))
    crop_height = min(height, max(1, round(width / ratio[0])))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def resample_filter(interpolation: str) -> Image.Resampling:
    """Pillow's filter for a teacher's `interpolation`; like open_clip, anything but bilinear is bicubic."""
    return Image.Resampling.BILINEAR if interpolation == "bilinear" else Image.Resampling.BICUBIC


def is_flipped(numbers: Sequence[float]) -> bool:
    """Whether this view would be mirrored, where mirroring is on: half of them are."""
    return numbers[-1] < 0.5


def jpeg_reduction(box: Box, image_size: int) -> int:
    """By how much a JPEG may be reduced while it is decoded: 1, 2, 4 or 8.

    The crop keeps at least twice the pixels of the output a side, so that the resize that follows still decides how the
    view looks (Pillow's `reducing_gap=2`). It depends on the key and the image alone, so a view still repeats exactly.
    """
    spare = min(box[2] - box[0], box[3] - box[1]) / (2 * image_size)
    return next(factor for factor in (8, 4, 2, 1) if factor <= max(spare, 1))


@dataclass(frozen=True)
class ViewMaker:
    """Makes views of one kind.

    Attributes:
        settings: ranges of the crop, and whether views are mirrored.
        image_size: side of the square view, pixels.
        resample: filter of the resize: the teacher's own.
    """

    settings: AugmentSettings
    image_size: int
    resample: Image.Resampling

    def view(self, data: bytes, numbers: Sequence[float]) -> NDArray[np.uint8]:
        """One view of an image file.

        Args:
            data: the file's bytes.
            numbers: `NUM_UNIFORMS` uniform numbers in [0, 1): the view is a function of these and the file.

        Returns:
            (image_size, image_size, 3) uint8.

        Raises:
            ImageError: if the file cannot be decoded.
        """
        reduced = self._decode_reduced(data, numbers) if len(data) >= _LARGE_BYTES else None
        image = reduced.image if reduced else decode_image(data)
        box = reduced.box if reduced else self._box(image.size, numbers)
        side = (self.image_size, self.image_size)
        view = np.asarray(image.resize(side, self.resample, box=box, reducing_gap=2.0))
        return view[:, ::-1] if self.settings.flip and is_flipped(numbers) else view

    def _box(self, size: tuple[int, int], numbers: Sequence[float]) -> Box:
        return crop_box(*size, self.settings.scale, self.settings.ratio, numbers)

    def _decode_reduced(self, data: bytes, numbers: Sequence[float]) -> "_Reduced | None":
        """A JPEG much larger than its view, decoded to fewer pixels, and the crop in them; None where that fails.

        What fails here is for `decode_image` to judge: it names the fault or finds the pixels good after all.
        """
        try:
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
                width, height = image.size
                is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
                upright_size = (height, width) if is_turned else (width, height)
                box = self._box(upright_size, numbers)
                factor = jpeg_reduction(box, self.image_size)
                if factor == 1:
                    return None
                image.draft("RGB", (width // factor, height // factor))
                upright = ImageOps.exif_transpose(image).convert("RGB")
        except Exception:  # the decoders raise almost anything on damaged bytes
            return None
        across, down = upright.width / upright_size[0], upright.height / upright_size[1]
        return _Reduced(upright, (box[0] * across, box[1] * down, box[2] * across, box[3] * down))


class _Reduced(NamedTuple):
    image: Image.Image
    box: tuple[float, float, float, float]
