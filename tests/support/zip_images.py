"""A source of images as a user could write it outside of the package: the images of a zip file."""

import zipfile
from datetime import UTC, datetime
from pathlib import Path

from dimefm.cache import InputError
from dimefm.stages.images.decode import ImageError
from dimefm.stages.inputs.image_source import FoundImage, ImageSource


class ZipImages(ImageSource):
    """Images by the names of their members. The file is opened for each of them: slow, and safe in every worker."""

    def __init__(self, path):
        self.path, self.location = path, str(path)

    def at_hand(self):
        return self.path.is_file()

    def list(self):
        if not self.at_hand():
            raise InputError(f"{self.path}: no such file; wanted a zip of images")
        with zipfile.ZipFile(self.path) as archive:
            return [self._found(member) for member in sorted(archive.infolist(), key=lambda member: member.filename)]

    def read(self, key):
        try:
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(key)
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise ImageError("gone") from error

    def _found(self, member):
        changed = datetime(*member.date_time, tzinfo=UTC)
        return FoundImage(member.filename, member.file_size, int(changed.timestamp() * 1e9))


def photos():
    return ZipImages(Path("photos.zip").resolve())


def dev_photos():
    return ZipImages(Path("dev.zip").resolve())


def no_source():
    return 3
