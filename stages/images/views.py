"""The view of an image that a student sees: a random resized crop, perhaps mirrored, as a function of its key.

The random numbers come from `counter_random.uniforms(key, row, pass)`, so a view depends on nothing but the run's seed,
the image's row and how often it was seen before: not on threads, not on where a run was resumed.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..settings.base import RandomCrop
from .crops import crop_box, crop_of, is_flipped
from .decode import ImageError, decode_image
from .jpeg import OpenJpeg


def jpeg_reduction(box: tuple[float, float, float, float], image_size: int) -> int:
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
        replays: whether these are the crops that stage one embedded: shares of the original's sides, so that they
            lie on the same part of the picture whatever its size here.
    """

    settings: RandomCrop
    image_size: int
    resample: Image.Resampling
    replays: bool = False

    def view(self, data: bytes | memoryview, numbers: Sequence[float]) -> NDArray[np.uint8]:
        """One view of an image file; see `make_views`."""
        return make_views([self], data, numbers)[0]

    def box(
        self, size: tuple[int, int], numbers: Sequence[float], original: tuple[int, int] | None = None
    ) -> tuple[float, float, float, float]:
        """The crop of an image of this (width, height), in its pixels.

        Args:
            original: size of what the image was made smaller from, where that is known.
        """
        if self.replays:
            return crop_of(self.settings, original or size, numbers).on(size)
        return crop_box(*size, self.settings.scale, self.settings.ratio, numbers)

    def finish(
        self, image: Image.Image, box: tuple[float, ...], turn: Image.Transpose | None, numbers: Sequence[float]
    ) -> NDArray[np.uint8]:
        """Resize a crop, turn it upright, perhaps mirror it: the small view is turned, not the large image."""
        side = (self.image_size, self.image_size)
        view = image.resize(side, self.resample, box=(box[0], box[1], box[2], box[3]), reducing_gap=2.0)
        pixels = np.asarray(view if turn is None else view.transpose(turn))
        return pixels[:, ::-1] if self.settings.flip and is_flipped(numbers) else pixels


def make_views(
    makers: Sequence[ViewMaker], data: bytes | memoryview, numbers: Sequence[float]
) -> list[NDArray[np.uint8]]:
    """One view of each kind from one image file, which is decoded once for each size that they can do with.

    A JPEG much larger than its view is decoded to fewer pixels. Each view has the bytes that it has alone.

    Args:
        data: the file's bytes.
        numbers: `NUM_UNIFORMS` uniform numbers in [0, 1): the views are a function of these and the file.

    Returns:
        For each maker (image_size, image_size, 3) uint8.

    Raises:
        ImageError: if the file cannot be decoded.
    """
    jpeg = OpenJpeg.open(data)
    whole: Image.Image | None = None
    reduced: dict[int, tuple[Image.Image, int] | None] = {}
    views = []
    for maker in makers:
        if jpeg is not None:
            box = maker.box(jpeg.size, numbers, jpeg.original_size)
            reduction = jpeg_reduction(box, maker.image_size)
            if reduction not in reduced:
                reduced[reduction] = None
                with suppress(ImageError):  # `decode_image` names the fault, or finds the pixels good after all
                    reduced[reduction] = jpeg.decode(reduction)
            if (decoded := reduced[reduction]) is not None:
                image, factor = decoded
                reduced_box = tuple(edge / factor for edge in jpeg.stored_box(box))
                views.append(maker.finish(image, reduced_box, jpeg.turn, numbers))
                continue
        whole = whole or decode_image(data)
        views.append(maker.finish(whole, maker.box(whole.size, numbers), None, numbers))
    return views
