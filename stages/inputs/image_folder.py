"""A folder of image files as a source of images."""

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

from ...cache.disk.cores import map_ahead
from ...cache.errors import InputError
from ..images.decode import AbsentError, ImageError
from .image_source import FoundImage, ImageList, ImageSource

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".png", ".webp")
"""In any case: JPEG by all of its names, PNG, WebP."""

_ENDINGS = tuple(suffix.encode() for suffix in SUFFIXES)
_LITTER = frozenset(
    [
        *(b"thumbs.db", b"ehthumbs.db", b"desktop.ini", b"icon\r", b"@eadir", b"@recycle", b"#recycle", b"__macosx"),
        *(b"$recycle.bin", b"system volume information", b"lost+found"),
    ]
)
"""What systems leave in folders, in small letters, beside names that begin with a dot (`._1.png`, `.DS_Store`)."""
_LONGEST_ENDING = 12
_KINDS_SHOWN = 8
_LITTER_KEY = ""

LISTING_THREADS = 16
"""More than there are cores: on a file server each look at a folder or a file is a wait."""

LISTING_AHEAD = 4 * LISTING_THREADS

LISTING_BATCH = 256
"""Files that a thread looks at in one go."""


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
        """Every image below the folder, by its ending (`SUFFIXES`), sorted by the bytes of its path.

        Links are followed; one that leads back into a folder it lies in ends there. Hidden files and folders, and what
        systems leave in folders, are passed over as files of other endings are: the notes of the list count them.

        Raises:
            InputError: if the folder is missing, is none, cannot be listed, or has no image below it.
        """
        others: Counter[str] = Counter()
        found: ImageList[FoundImage] = ImageList(_walk(self.root, others))
        found.notes = _passed_over(others)
        if not found:
            there = "".join(f"; {note}" for note in found.notes)
            raise InputError(f"{self.root}: no image below it{there}; wanted files that end in {', '.join(SUFFIXES)}")
        return found

    def passes_over(self, name: str) -> bool:
        """Whether `list` leaves an image out for its name, which an earlier version may have listed."""
        return any(_is_litter(part) for part in os.fsencode(name).split(b"/"))

    def stat(self, key: str) -> tuple[int, int]:
        """Size and modification time of an image file.

        Raises:
            AbsentError: if it cannot be reached.
        """
        try:
            status = (self.root / key).stat()
        except OSError as error:
            raise AbsentError("gone") from error
        return status.st_size, status.st_mtime_ns

    def read(self, key: str) -> bytes:
        """The bytes of an image file.

        Raises:
            ImageError: if a folder has taken its place.
            AbsentError: if it cannot be reached: it is gone, or its disk does not answer.
            InputError: if this process may open no more files, which is not the image's fault.
        """
        path = self.root / key
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise AbsentError("gone") from error
        except PermissionError as error:
            raise AbsentError("permission denied") from error
        except IsADirectoryError as error:
            raise ImageError("not a regular file") from error
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # would mark good images as bad
                advice = "raise `ulimit -n` or lower workers"
                raise InputError(f"{path}: too few file handles to open it; {advice}") from error
            raise AbsentError(f"cannot be read: {error.strerror}") from error

    def locate(self, key: str) -> str:
        """The path of an image file."""
        return str(self.root / key)


def _is_litter(name: bytes) -> bool:
    return name.startswith(b".") or name.lower() in _LITTER


def _passed_over(others: Mapping[str, int]) -> list[str]:
    """Lines on what a listing left out: files by their endings, the most frequent first, and litter."""
    endings = sorted((-count, ending) for ending, count in others.items() if ending != _LITTER_KEY)
    notes = []
    if endings:
        shown = [f"{-count:,} {ending}" for count, ending in endings[:_KINDS_SHOWN]]
        rest = -sum(count for count, _ in endings[_KINDS_SHOWN:])
        shown += [f"{rest:,} of other endings"] if rest else []
        notes.append(f"{', '.join(shown)} passed over: not JPEG, PNG or WebP")
    if num := others.get(_LITTER_KEY, 0):
        notes.append(f"{num:,} hidden or system files and folders passed over (._*, .DS_Store, Thumbs.db, @eaDir, ...)")
    return notes


def _ending(name: bytes) -> str:
    """How a file's name ends, for counting: `.gif`, `without an ending`."""
    ending = os.path.splitext(name)[1].lower()  # noqa: PTH122 - pathlib has no paths of bytes
    text = ending.decode(errors="replace")
    return text if 1 < len(text) <= _LONGEST_ENDING and text.isprintable() else "without an ending"


def _walk(folder: Path, others: Counter[str]) -> Iterator[FoundImage]:
    """The images below a folder, in order: several threads list the folders, then look at the files.

    A million names take some 50 MB meanwhile; what is known of a file is not kept here.

    Args:
        others: counts what is no image, by `_ending` and `_LITTER_KEY`.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; wanted one with images")
    root = os.path.join(os.fsencode(folder), b"")  # noqa: PTH118 - pathlib has no paths of bytes
    with ThreadPoolExecutor(LISTING_THREADS, thread_name_prefix="list") as pool:
        files = _in_order(_list_folders(pool, root, others))
        batches = iter(lambda: list(islice(files, LISTING_BATCH)), [])
        for found in map_ahead(pool, lambda batch: [_look_at(root, name) for name in batch], batches, LISTING_AHEAD):
            yield from found


def _list_folders(pool: ThreadPoolExecutor, root: bytes, others: Counter[str]) -> dict[bytes, list[bytes]]:
    """The sorted names in each folder, level by level; those of folders end in `/`, and so whole paths are sorted."""
    listed: dict[bytes, list[bytes]] = {}
    level = [(b"", frozenset[tuple[int, int]]())]
    while level:
        below = []
        for (folder, _), (names, inside_of, passed_over) in zip(
            level, map_ahead(pool, partial(_list_folder, root), level, LISTING_AHEAD)
        ):
            listed[folder] = names
            others += passed_over
            below += [(folder + name, inside_of) for name in names if name.endswith(b"/")]
        level = below
    return listed


def _list_folder(
    root: bytes, folder: tuple[bytes, frozenset[tuple[int, int]]]
) -> tuple[list[bytes], frozenset[tuple[int, int]], Counter[str]]:
    """Names in a folder, the identities of it and the folders above it, and a count of what is passed over.

    A folder inside itself has no names.
    """
    path, inside_of = root + folder[0], folder[1]
    names, others = [], Counter[str]()
    try:
        status = os.stat(path)  # noqa: PTH116
        identity = (status.st_dev, status.st_ino)
        if identity in inside_of:
            return [], inside_of, others
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                if _is_litter(name):
                    others[_LITTER_KEY] += 1
                elif _is_folder(entry):
                    names.append(name + b"/")
                elif name.lower().endswith(_ENDINGS):
                    names.append(name)
                else:
                    others[_ending(name)] += 1
    except OSError as error:
        raise InputError(f"{os.fsdecode(path)}: the folder cannot be listed: {error.strerror}") from error
    return sorted(names), inside_of | {identity}, others


def _in_order(listed: dict[bytes, list[bytes]]) -> Iterator[bytes]:
    """Paths of files, depth first; a folder's names are dropped as it is entered."""
    open_folders = [(b"", iter(listed.pop(b"")))]
    while open_folders:
        folder, names = open_folders[-1]
        for name in names:
            if name.endswith(b"/"):
                open_folders.append((folder + name, iter(listed.pop(folder + name))))
                break
            yield folder + name
        else:
            open_folders.pop()


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _look_at(root: bytes, relative: bytes) -> FoundImage:
    try:
        source = relative.decode()
        problem = None
    except UnicodeDecodeError:
        source = relative.decode(errors="backslashreplace")
        problem = "file name is not UTF-8"
    try:
        status = os.stat(root + relative)  # noqa: PTH116
    except OSError:
        return FoundImage(source, 0, 0, problem or "broken link")
    if not stat.S_ISREG(status.st_mode):
        problem = problem or "not a regular file"  # opening a pipe would wait for ever
    return FoundImage(source, status.st_size, status.st_mtime_ns, problem)
