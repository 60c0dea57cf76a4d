"""Images on disk: which files there are, in the order that numbers the rows, and their pixels."""

import errno
import os
import stat
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from PIL import Image

from ...cache.disk.durable import digest
from ...cache.errors import InputError
from ..images.decode import ImageError, decode_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

HASH_WINDOW = 256
"""Files that are being hashed at a time."""


@dataclass(frozen=True, slots=True)
class FoundImage:
    """A file that counts as an image, looked at but not opened.

    Attributes:
        source: path below the folder, with `/`; bytes that are not UTF-8 are shown as `\\xff`.
        bytes: size of the file; 0 where it could not be looked at.
        modified_ns: time of its last change, nanoseconds since 1970; 0 where it could not be looked at.
        problem: why it can never be opened under this name, or None.
    """

    source: str
    bytes: int
    modified_ns: int
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class LabelledImage(FoundImage):
    """An image of an evaluation set; its class is the first folder of its path."""

    class_id: str = ""


def find_images(folder: Path) -> list[FoundImage]:
    """Every image below a folder (.jpg, .jpeg, .png, .webp in any case), sorted by the bytes of its path.

    Links are followed; one that leads back into a folder it lies in ends there.

    Raises:
        InputError: if the folder is missing, is none, cannot be listed, or has no image below it.
    """
    found = list(_walk(folder))
    if not found:
        raise InputError(f"{folder}: no image below it; wanted files that end in {', '.join(SUFFIXES)}")
    return found


def find_labelled_images(folder: Path, class_ids: Collection[str]) -> list[LabelledImage]:
    """The images of an evaluation set, one folder per class id; a class without images is allowed.

    Raises:
        InputError: as `find_images`, and if images lie outside of a class's folder.
    """
    known = frozenset(class_ids)
    images = [LabelledImage(**asdict(image), class_id=image.source.partition("/")[0]) for image in find_images(folder)]
    strangers = sorted({image.class_id for image in images} - known)
    if strangers:
        shown = ", ".join(strangers[:3]) + (f" and {len(strangers) - 3} more" if len(strangers) > 3 else "")
        raise InputError(f"{folder}: {shown}: not a class id; wanted one folder for each class id and nothing else")
    return images


def file_digests(folder: Path, sources: Iterable[str]) -> Iterator[str | None]:
    """XXH3-128 of image files, in order, read by several threads; None for one that cannot be read."""

    def digest_of(source: str) -> str | None:
        try:
            return digest(read_file(folder / source))
        except ImageError:
            return None

    with ThreadPoolExecutor(thread_name_prefix="hash") as pool:
        remaining = iter(sources)
        while window := list(islice(remaining, HASH_WINDOW)):
            yield from pool.map(digest_of, window)


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
