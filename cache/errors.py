"""Known errors: the command line shows each as one line, `error: …`, and exits with 1."""

import difflib
import errno
from collections.abc import Iterable


class DimefmError(Exception):
    """A known error. Its text is one line: where, what was found, what was wanted, what to do."""


class CacheError(DimefmError):
    """Something about a cache on disk: unfinished, foreign, damaged, or of another teacher."""


class InputError(DimefmError, ValueError):
    """Something the user gave: a config, an image folder, sentences, a checkpoint, a student."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about a name that does not exist: up to three known names that are close to it.

    Returns:
        `; did you mean A or B?`, or nothing where none is close.

    >>> did_you_mean("shard_row", ["dir", "shard_rows"])
    '; did you mean shard_rows?'
    """
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


OS_ADVICE = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some of the quota and run the same command again",
    errno.EFBIG: "wanted a disk, and a limit (`ulimit -f`), that allow a file of this size",
    errno.EROFS: "wanted a disk that can be written",
    errno.EACCES: "wanted the right to read or write it",
    errno.EPERM: "wanted the right to read or write it",
    errno.EMFILE: "raise `ulimit -n` or lower workers, and run the same command again",
    errno.ENFILE: "this machine has too many files open; run the same command again when it has fewer",
}


def os_advice(error: BaseException) -> str | None:
    """One line on what the operating system refused, where the machine is at fault and not the program; else None.

    These can come from any file that is touched. What was on disk before stays as it was: files are written whole.

    Args:
        error: of the operating system, or one that was raised from such an error.
    """
    if not isinstance(error, OSError) or error.errno not in OS_ADVICE:
        return None if error.__cause__ is None else os_advice(error.__cause__)
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}; {OS_ADVICE[error.errno]}"
