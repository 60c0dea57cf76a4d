"""Known errors: the command line shows each as one line, `error: …`, and exits with 1."""


class DimefmError(Exception):
    """A known error. Its text is one line: where, what was found, what was wanted, what to do."""


class CacheError(DimefmError):
    """Something about a cache on disk: unfinished, foreign, damaged, or of another teacher."""


class InputError(DimefmError, ValueError):
    """Something the user gave: a config, an image folder, sentences, a checkpoint, a student."""
