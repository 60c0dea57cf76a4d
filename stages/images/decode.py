"""Bytes of an image file become pixels: upright, of the first frame, RGB, or a short reason why not."""

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP")
"""Decoders that may run, whatever a file's name says: a wrong extension among these three does no harm."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the image upright."""


class ImageError(Exception):
    """An image cannot be used. Its text is a short reason, the same for every file with the same fault."""


class AbsentError(ImageError):
    """An image could not be reached: it is gone, or the disk that it lies on. That says nothing about its content."""


def decode_image(data: bytes | memoryview) -> Image.Image:
    """Decode an image file: upright by its EXIF orientation, of an animation the first frame, mode RGB.

    Colour is converted before anything is resized, as training pipelines do: Pillow would resize a palette image by
    nearest neighbour. Alpha is dropped, as by open_clip.

    Raises:
        ImageError: if it is no image, is cut short, is damaged or would decompress to an absurd size.
    """
    if not len(data):
        raise ImageError("empty file")
    with decoder_errors():
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
    turn = turn_of(image)
    return to_rgb(image if turn is None else image.transpose(turn))


@contextmanager
def decoder_errors() -> Iterator[None]:
    """Turn what Pillow's decoders raise on bad bytes into a short reason.

    Raises:
        ImageError: in place of every error but a lack of memory, which is this machine's fault and not the file's.
    """
    try:
        yield
    except UnidentifiedImageError as error:
        raise ImageError("not a JPEG, PNG or WebP image") from error
    except Image.DecompressionBombError as error:
        raise ImageError("decompression bomb") from error
    except MemoryError:
        raise
    except Exception as error:  # the decoders raise almost anything on damaged bytes
        raise ImageError("truncated" if "truncated" in str(error).lower() else "damaged") from error


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What makes an image upright, according to its EXIF."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF: the pixels are still good
        return None
    return _UPRIGHT.get(orientation) if isinstance(orientation, int) else None


def to_rgb(image: Image.Image) -> Image.Image:
    """Mode RGB, whatever it was; alpha is dropped."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        # 16 bits a pixel: Pillow's own conversion clips every value above 255 to white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours; straight to RGB, Pillow warns
    return image.convert("RGB")
