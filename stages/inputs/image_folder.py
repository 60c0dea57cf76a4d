"""A folder of image files as a source of images."""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from ...cache.errors import InputError
from ..images.decode import ImageError, decode_image
from .image_source import FoundImage, ImageSource

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class ImageFolder(ImageSource):
    """Image files below a folder. A row's name, and its key, is the path below the folder."""

    absent = "no such folder"

    def __init__(self, root: Path) -> None:
        """Nothing is looked for yet."""
        self.root, self.location = root, str(root)

    def at_hand(self) -> bool:
        """Whether the folder is there."""
        return self.root.is_dir()

    def list(self) -> Sequence[FoundImage]:
        """Every image below the folder (.jpg, .jpeg, .png, .webp in any case), sorted by the bytes of its path.

        Links are followed; one that leads back into a folder it lies in ends there.

        Raises:
            InputError: if the folder is missing, is none, cannot be listed, or has no image below it.
        """
        found = [*_walk(self.root)]
        if not found:
            raise InputError(f"{self.root}: no image below it; wanted files that end in {', '.join(SUFFIXES)}")
        return found

    def read(self, key: str) -> bytes:
        """The bytes of an image file.

        Raises:
            ImageError: if it cannot be read.
            InputError: if this process may open no more files, which is not the image's fault.
        """
        return read_file(self.root / key)

    def locate(self, key: str) -> str:
        """The path of an image file."""
        return str(self.root / key)


def read_image(path: Path) -> Image.Image:
    """One image, upright, all of its pixels loaded, mode RGB.

    Raises:
        ImageError: if it cannot be read or decoded.
    """
    return decode_image(read_file(path))


def read_file(path: Path) -> bytes:
    """The bytes of an image file.

    Raises:
        ImageError: if it cannot be read.
        InputError: if this process may open no more files, which is not the image's fault.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError("gone") from error
    except PermissionError as error:
        raise ImageError("permission denied") from error
    except IsADirectoryError as error:
        raise ImageError("not a regular file") from error
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):  # would mark good images as bad
            raise InputError(f"{path}: too few file handles to open it; raise `ulimit -n` or lower workers") from error
        raise ImageError(f"cannot be read: {error.strerror}") from error


def _walk(folder: Path) -> Iterator[FoundImage]:
    """Depth first, each folder's entries sorted with a `/` behind the names of folders: whole paths come out sorted."""
    if not folder.is_dir():
        raise InputError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; wanted one with images")
    root = os.fsencode(folder)
    stack = [(b"", True, frozenset[tuple[int, int]]())]
    while stack:
        relative, is_folder, inside_of = stack.pop()
        path = os.path.join(root, relative)  # noqa: PTH118 - pathlib has no paths of bytes
        if not is_folder:
            yield _look_at(path, relative)
            continue
        try:
            status = os.stat(path)  # noqa: PTH116
            entries = list(os.scandir(path))
        except OSError as error:
            raise InputError(f"{os.fsdecode(path)}: the folder cannot be listed: {error.strerror}") from error
        identity = (status.st_dev, status.st_ino)
        if identity in inside_of:
            continue
        below = []
        for entry in entries:
            if _is_folder(entry):
                below.append((relative + entry.name + b"/", True, inside_of | {identity}))
            elif entry.name.lower().endswith(tuple(os.fsencode(suffix) for suffix in SUFFIXES)):
                below.append((relative + entry.name, False, frozenset()))
        stack.extend(sorted(below, key=lambda item: item[0], reverse=True))


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _look_at(path: bytes, relative: bytes) -> FoundImage:
    try:
        source = relative.decode()
        problem = None
    except UnicodeDecodeError:
        source = relative.decode(errors="backslashreplace")
        problem = "file name is not UTF-8"
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return FoundImage(source, 0, 0, problem or "broken link")
    if not stat.S_ISREG(status.st_mode):
        problem = problem or "not a regular file"  # opening a pipe would wait for ever
    return FoundImage(source, status.st_size, status.st_mtime_ns, problem)
