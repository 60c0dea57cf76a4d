"""JPEGs decoded to fewer pixels than they have, for views that are much smaller."""

import io
import re
from dataclasses import dataclass

from PIL import Image

from .decode import ImageError, decoder_errors, to_rgb, turn_of

_TURNS = {
    None: (False, False, False),
    Image.Transpose.FLIP_LEFT_RIGHT: (False, True, False),
    Image.Transpose.ROTATE_180: (False, True, True),
    Image.Transpose.FLIP_TOP_BOTTOM: (False, False, True),
    Image.Transpose.TRANSPOSE: (True, False, False),
    Image.Transpose.ROTATE_270: (True, False, True),
    Image.Transpose.TRANSVERSE: (True, True, True),
    Image.Transpose.ROTATE_90: (True, True, False),
}
"""What makes a picture upright -> whether width and height change places, and whether the stored columns and rows then
run the other way."""
_JPEG_BEGINS = b"\xff\xd8"
_ORIGINAL = re.compile(rb"dimefm: made from ([1-9]\d{0,5}) x ([1-9]\d{0,5}) pixels")


def size_note(size: tuple[int, int]) -> bytes:
    """The comment in a JPEG that was made smaller from an image of this (width, height)."""
    return b"dimefm: made from %d x %d pixels" % size


@dataclass(frozen=True, slots=True)
class OpenJpeg:
    """A JPEG of which only the headers were read.

    Attributes:
        data: the file.
        stored_size: (width, height), pixels, as they lie in the file.
        turn: what makes the stored picture upright; None where it is.
        original_size: (width, height) of the upright picture that this one was made smaller from, if it says so.
    """

    data: bytes | memoryview
    stored_size: tuple[int, int]
    turn: Image.Transpose | None
    original_size: tuple[int, int] | None = None

    @classmethod
    def open(cls, data: bytes | memoryview) -> "OpenJpeg | None":
        """Read the headers; None where this is no JPEG, or one that cannot be opened: `decode_image` says why."""
        if bytes(data[:2]) != _JPEG_BEGINS:
            return None
        try:
            with decoder_errors():
                image = Image.open(io.BytesIO(data), formats=("JPEG",))
        except ImageError:
            return None
        comment = image.info.get("comment")
        note = _ORIGINAL.fullmatch(comment) if isinstance(comment, bytes) else None
        original_size = (int(note[1]), int(note[2])) if note else None
        return cls(data, image.size, turn_of(image), original_size)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the upright picture."""
        width, height = self.stored_size
        return (height, width) if _TURNS[self.turn][0] else (width, height)

    def decode(self, reduction: int) -> tuple[Image.Image, int]:
        """The stored picture, not turned, mode RGB, in fewer pixels: fine detail is never decoded.

        Args:
            reduction: 1, 2, 4 or 8.

        Returns:
            The picture, and by how much it was really reduced. Its pixel i covers the stored ones from i * reduction
            on, so its last row and column may reach beyond the picture's edge.

        Raises:
            ImageError: as `decode_image`.
        """
        with decoder_errors():
            image = Image.open(io.BytesIO(self.data), formats=("JPEG",))
            image.draft("RGB", (self.stored_size[0] // reduction, self.stored_size[1] // reduction))
            image.load()
        return to_rgb(image), 1 if image.size == self.stored_size else reduction

    def stored_box(self, box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        """Where a box (left, top, right, bottom) of the upright picture lies in the stored one."""
        left, top, right, bottom = box
        width, height = self.stored_size
        on_its_side, from_right, from_below = _TURNS[self.turn]
        if on_its_side:
            left, top, right, bottom = top, left, bottom, right
        if from_right:
            left, right = width - right, width - left
        if from_below:
            top, bottom = height - bottom, height - top
        return left, top, right, bottom
