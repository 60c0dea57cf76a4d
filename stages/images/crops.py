"""Which part of an image a random view shows, and whether it is mirrored: computed from a key, before any pixel is.

The crops that a cache holds (`cache.views`) are a function of their settings, the image's row, the number of the view
and the upright image's width and height. As shares of the two sides they are the same for the teacher and for a student
of another size, and nothing of them needs to be stored.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from ...cache.version.schema import Views
from ..counter_random import key_of, uniforms
from ..settings.base import RandomCrop
from ..settings.cache import CropSettings

_TRIES = 10
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


def is_flipped(numbers: Sequence[float]) -> bool:
    """Whether this view would be mirrored, where mirroring is on: half of them are."""
    return numbers[-1] < 0.5


@dataclass(frozen=True, slots=True)
class Crop:
    """A crop of an image of any size.

    Attributes:
        box: (left, top, right, bottom) as shares of the upright image's width and height, in [0, 1].
        flip: whether what is inside is mirrored.
    """

    box: tuple[float, float, float, float]
    flip: bool

    def on(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """The box in pixels of an image of this (width, height)."""
        (left, top, right, bottom), (width, height) = self.box, size
        return left * width, top * height, right * width, bottom * height


def crop_of(settings: RandomCrop, size: tuple[int, int], numbers: Sequence[float]) -> Crop:
    """The crop of an image of this (width, height); see `crop_box` for the numbers."""
    width, height = size
    left, top, right, bottom = crop_box(width, height, settings.scale, settings.ratio, numbers)
    return Crop((left / width, top / height, right / width, bottom / height), settings.flip and is_flipped(numbers))


def resample_filter(interpolation: str) -> Image.Resampling:
    """Pillow's filter for a teacher's `interpolation`; like open_clip, anything but bilinear is bicubic."""
    return Image.Resampling.BILINEAR if interpolation == "bilinear" else Image.Resampling.BICUBIC


def cut(image: Image.Image, crop: Crop, size: tuple[int, int], resample: Image.Resampling) -> NDArray[np.uint8]:
    """Resize a crop of an image, whole and upright, to (width, height) = `size`: (height, width, 3) uint8."""
    pixels = np.asarray(image.resize(size, resample, box=crop.on(image.size)))
    return pixels[:, ::-1] if crop.flip else pixels


@dataclass(frozen=True)
class Crops:
    """The crops of each training image that a cache holds beside the centre: views 1 to `count`.

    Attributes:
        count: crops of each image.
        settings: what they are like, and their seed.
    """

    count: int
    settings: CropSettings

    @classmethod
    def read(cls, views: Views | None) -> "Crops | None":
        """From `views` of plan.json; None where a cache has the centre alone."""
        return cls(views.count, CropSettings.model_validate(views.crops)) if views else None

    @property
    def key(self) -> int:
        """Key that their random numbers derive from."""
        return key_of(self.settings.seed, "crops")

    def numbers(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[np.float64]:
        """(B, NUM_UNIFORMS) numbers of one view each of these rows; views count from 1, the centre being 0."""
        return uniforms(self.key, rows, views, NUM_UNIFORMS)

    def of_row(self, row: int, size: tuple[int, int]) -> list[Crop]:
        """All crops of a row whose upright image has this (width, height), in the order of views."""
        views = np.arange(1, self.count + 1)
        numbers = self.numbers(np.full(self.count, row), views).tolist()
        return [crop_of(self.settings, size, of_view) for of_view in numbers]


def decoder() -> dict[str, str]:
    """What turns files into pixels here: the pixels of a JPEG depend on its library's version."""
    found = {"pillow": Image.__version__, "libwebp": features.version("webp"), "zlib": features.version("zlib")}
    turbo = features.version("libjpeg_turbo")
    found["libjpeg"] = f"turbo {turbo}" if turbo else features.version("jpg")
    return {name: str(version) for name, version in sorted(found.items()) if version}
