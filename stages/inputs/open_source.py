"""From `images.source` of a config to a source of images: one line for each kind."""

from collections.abc import Callable
from pathlib import Path

from ...cache.errors import InputError
from ..settings.plugins import is_function, load_function
from .image_folder import ImageFolder
from .image_source import ImageSource


def open_source(source: str | Path | ImageSource) -> ImageSource:
    """A source of images; nothing is read or looked for yet.

    Args:
        source: what a config says: a path, or `package.module:function` of a source from outside of the package. A
            source that is open is returned as it is.

    Raises:
        InputError: if the function cannot be imported, or does not make a source.
    """
    if not isinstance(source, str | Path):
        return source
    spec = str(source)
    return next(make for is_one, make in KINDS if is_one(spec))(spec)


def _from_outside(spec: str) -> ImageSource:
    made = load_function(spec)()
    if not isinstance(made, ImageSource):
        raise InputError(
            f"{spec}: made a {type(made).__name__}; wanted an instance of a class that derives from "
            "dimefm.stages.inputs.image_source.ImageSource"
        )
    made.location = made.location or spec
    return made


KINDS: tuple[tuple[Callable[[str], bool], Callable[[str], ImageSource]], ...] = (
    (is_function, _from_outside),
    (lambda spec: True, lambda spec: ImageFolder(Path(spec))),
)
"""For each kind of source, whether a text in a config names one, and what opens it; the first that fits is taken."""
