"""Making images small: how near a view of the kept picture is to one of the original, and what is decoded how often."""

import io
import threading
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image

from dimefm.cache.reader.pixel_packs import PixelPacks
from dimefm.stages.embed import pack_pixels as keep_pixels
from dimefm.stages.embed.image_rows import embed_image_shard
from dimefm.stages.embed.pack_pixels import PackedImage, SourceError, make_small, open_pack, pack_shard
from dimefm.stages.embed.tasks import PackTask
from dimefm.stages.images.decode import decode_image
from dimefm.stages.inputs.image_folder import ImageFolder
from dimefm.stages.models.load_teacher import load_teacher
from dimefm.stages.settings.models import TeacherSettings

from ...support.paths import ROOT

SIDE = 64
ANYWHERE = ImageFolder(Path())
"""Keys are whole paths."""


def photo(seed: int, width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8 with the spectrum of a photo: energy falls with frequency, colours mostly together."""
    random = np.random.default_rng(seed)
    fy, fx = np.meshgrid(np.fft.fftfreq(height), np.fft.rfftfreq(width), indexing="ij")
    frequency = np.hypot(fx, fy)
    frequency[0, 0] = 1

    def plane(power: float) -> np.ndarray:
        noise = np.fft.rfft2(random.normal(size=(height, width))) / frequency**power
        values = np.fft.irfft2(noise, (height, width))
        return values / values.std()

    light = 45 * plane(1.2)
    return np.clip(np.stack([light + 128 + 15 * plane(1.5) for _ in range(3)], axis=-1), 0, 255).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def kept(data: bytes, side: int = SIDE) -> bytes:
    return make_small(data, decode_image(data), side)


def pixels(data: bytes) -> np.ndarray:
    """What is in a JPEG file, by Pillow alone, with no turning and no conversion."""
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.mode) == ("JPEG", "RGB")
        assert ExifTags.Base.Orientation not in image.getexif()
        return np.asarray(image)


def view(picture: np.ndarray, box: tuple[float, float, float, float], side: int) -> np.ndarray:
    """A crop at shares of the width and height, resized by torch: neither Pillow's code nor this project's."""
    height, width = picture.shape[:2]
    left, top, right, bottom = (round(share * length) for share, length in zip(box, (width, height, width, height)))
    crop = torch.from_numpy(picture[top:bottom, left:right].copy()).permute(2, 0, 1)[None].float()
    resized = F.interpolate(crop, (side, side), mode="bicubic", antialias=True, align_corners=False)
    return resized[0].clamp(0, 255).numpy()


def turned(picture: np.ndarray, orientation: int) -> bytes:
    """A JPEG that is to be shown as `picture`, stored lying down."""
    stored = {3: np.rot90(picture, 2), 6: np.rot90(picture), 8: np.rot90(picture, -1)}[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(Image.fromarray(np.ascontiguousarray(stored)), "JPEG", quality=97, subsampling=0, exif=exif)


def with_alpha(picture: np.ndarray) -> Image.Image:
    alpha = np.random.default_rng(1).integers(0, 256, (*picture.shape[:2], 1), np.uint8)
    return Image.fromarray(np.concatenate([picture, alpha], axis=-1))


PICTURE = photo(0, 384, 256)
GREY = photo(1, 384, 256)[:, :, :1].repeat(3, axis=2)
SOURCES = {
    "jpeg": (PICTURE, encoded(Image.fromarray(PICTURE), "JPEG", quality=97, subsampling=0)),
    "png": (PICTURE, encoded(Image.fromarray(PICTURE), "PNG")),
    "webp": (PICTURE, encoded(Image.fromarray(PICTURE), "WEBP", lossless=True)),
    "turned by 180": (PICTURE, turned(PICTURE, 3)),
    "turned right": (PICTURE, turned(PICTURE, 6)),
    "turned left": (PICTURE, turned(PICTURE, 8)),
    "alpha": (PICTURE, encoded(with_alpha(PICTURE), "PNG")),
    "cmyk": (PICTURE, encoded(Image.fromarray(PICTURE).convert("CMYK"), "JPEG", quality=97, subsampling=0)),
    "grey": (GREY, encoded(Image.fromarray(GREY[:, :, 0]), "JPEG", quality=97)),
    "16 bit": (GREY, encoded(Image.fromarray(GREY[:, :, 0].astype(np.uint16) * 257), "PNG")),
}
BOXES = [(0, 0, 1, 1), (1 / 16, 1 / 8, 15 / 16, 7 / 8), (1 / 4, 1 / 8, 1, 7 / 8)]
"""Whole pixels of both, so that the views show the same."""


@pytest.mark.parametrize("name", SOURCES)
def test_a_view_of_a_kept_picture_is_near_the_view_of_the_original(name: str) -> None:
    """Kept at 128 pixels, seen at 96: on average less than 3.5 of 255 off; 0.08 of the picture's own deviation."""
    picture, data = SOURCES[name]
    small = pixels(kept(data, 128))
    assert small.shape == (128, 192, 3)
    for box in BOXES:
        original, now = view(picture, box, 96), view(small, box, 96)
        assert np.abs(original - now).mean() < 3.0
        assert np.sqrt(((original - now) ** 2).mean()) < 0.12 * original.std()


def test_the_bound_would_show_a_picture_that_is_turned_or_shifted_by_a_pixel() -> None:
    original = view(PICTURE, BOXES[0], 96)
    small = pixels(kept(SOURCES["png"][1], 128))
    for wrong in (small[:, ::-1], small[::-1, ::-1], np.roll(small, 1, axis=1), small[:, :, ::-1]):
        assert np.abs(original - view(wrong, BOXES[0], 96)).mean() > 7.0


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((320, 240), (85, 64)),
        ((240, 320), (64, 85)),
        ((65, 65), (64, 64)),
        ((64, 500), (64, 500)),
        ((40, 30), (40, 30)),
        ((1, 1), (1, 1)),
        ((1, 70_000), (1, 65_500)),
        ((200, 1), (200, 1)),
    ],
)
def test_the_shorter_side_is_brought_down_to_the_setting_and_nothing_is_enlarged(
    size: tuple[int, int], wanted: tuple[int, int]
) -> None:
    data = encoded(Image.new("RGB", size, (10, 200, 30)), "PNG")
    with Image.open(io.BytesIO(kept(data))) as image:
        assert image.size == wanted
        assert np.abs(np.asarray(image).astype(int) - (10, 200, 30)).max() <= 3


def test_an_upright_rgb_jpeg_that_is_small_already_is_kept_byte_for_byte() -> None:
    data = encoded(Image.fromarray(photo(2, 80, 64)), "JPEG", quality=60)
    assert len(data) < 80 * 64 and kept(data) is data


def small_ones() -> dict[str, bytes]:
    picture = photo(2, 80, 64)
    image = Image.fromarray(picture)
    return {
        "a pixel too large": encoded(Image.fromarray(photo(2, 81, 65)), "JPEG", quality=60),
        "turned": turned(picture, 6),
        "grey": encoded(image.convert("L"), "JPEG", quality=60),
        "cmyk": encoded(image.convert("CMYK"), "JPEG", quality=60),
        "png": encoded(image, "PNG"),
        "padded with metadata": encoded(image, "JPEG", quality=60, comment=b"x" * 6000),
    }


@pytest.mark.parametrize("name", small_ones())
def test_what_is_no_such_jpeg_is_coded_again(name: str) -> None:
    data = small_ones()[name]
    again = kept(data)
    assert again != data and pixels(again).shape == (64, 80, 3)
    assert b"xxxx" not in again


@pytest.fixture
def folder(tmp_path: Path) -> list[Path]:
    """Nine readable files of every kind, a damaged one and an empty one."""
    files = []
    for name, (_, data) in SOURCES.items():
        files.append(tmp_path / f"{name}.png")
        files[-1].write_bytes(data)
    (tmp_path / "small.jpg").write_bytes(encoded(Image.fromarray(photo(3, 60, 50)), "JPEG", quality=60))
    (tmp_path / "damaged.png").write_bytes(SOURCES["png"][1][:5000])
    (tmp_path / "empty.jpg").write_bytes(b"")
    return [*files, *(tmp_path / name for name in ("small.jpg", "damaged.png", "empty.jpg"))]


def task(path: Path) -> PackTask:
    return PackTask(path, "pixels/jpeg-64", 0, SIDE, 16)


def test_stage_one_decodes_each_image_once_for_the_teacher_and_for_its_pack(
    folder: list[Path], tmp_path: Path, tiny_teacher: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in Pillow itself: every decoder that is started, one for each file that can be opened."""
    settings = TeacherSettings(model=str(tiny_teacher[0]), pretrained=str(tiny_teacher[1]))
    teacher = load_teacher(settings, torch.device("cpu"))
    alone = embed_image_shard(teacher, ANYWHERE, folder, 4, 2, threading.Lock())
    started: list[str] = []
    original = PIL.Image._getdecoder

    def count(mode: str, name: str, *rest: object) -> object:
        started.append(name)
        return original(mode, name, *rest)

    monkeypatch.setattr(PIL.Image, "_getdecoder", count)
    with open_pack(task(tmp_path / "kept" / "000000.pack")) as pack:
        result = embed_image_shard(teacher, ANYWHERE, folder, 4, 2, threading.Lock(), pack)
    pack.attempt.commit()
    readable = len(folder) - 2
    assert len(started) == readable + 1  # the damaged one starts a decoder too, the empty one does not
    assert np.array_equal(result.embeddings, alone.embeddings, equal_nan=True) and result.failures == alone.failures
    packs = PixelPacks(tmp_path / "kept", "jpeg-64", len(folder), 16)
    assert [packs.read(row) for row in range(readable)] == [kept(path.read_bytes()) for path in folder[:readable]]
    assert result.seconds["keep"] > 0 and "keep" not in alone.seconds


def test_a_row_that_the_teacher_fails_on_has_no_pixels(
    folder: list[Path], tmp_path: Path, tiny_teacher: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TeacherSettings(model=str(tiny_teacher[0]), pretrained=str(tiny_teacher[1]))
    teacher = load_teacher(settings, torch.device("cpu"))
    output = torch.ones(4, 32)
    output[1, 3] = float("nan")
    monkeypatch.setattr(teacher, "encode_images", lambda _: output)
    with open_pack(task(tmp_path / "000000.pack")) as pack:
        result = embed_image_shard(teacher, ANYWHERE, folder, 4, 2, threading.Lock(), pack)
    assert not (tmp_path / "000000.pack").exists()
    pack.attempt.commit()
    failed = {row for row, _ in result.failures}
    table = np.fromfile(tmp_path / "000000.pack", "<u8", offset=(tmp_path / "000000.pack").stat().st_size - 8 * 17)
    assert {row for row in range(len(folder)) if table[row] == table[row + 1]} == failed == {1, 5, 9, 11, 12}


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_a_pack_from_the_sources_alone_is_the_same_bytes_whatever_the_threads(
    folder: list[Path], tmp_path: Path, workers: int
) -> None:
    wanted = [PackedImage(path, path.stat().st_size, None, lost=False) for path in folder[:-2]]
    record = pack_shard(task(tmp_path / "000000.pack"), ANYWHERE, [wanted[0], None, *wanted[1:]], workers)
    assert (record.array, record.shard, record.num_rows) == ("pixels/jpeg-64", 0, len(folder) - 1)
    data = b"".join(kept(path.read_bytes()) for path in folder[:-2])
    assert (tmp_path / "000000.pack").read_bytes()[: -8 * 17] == data


def test_an_image_that_is_no_longer_what_was_embedded_is_not_kept(folder: list[Path], tmp_path: Path) -> None:
    good, damaged = folder[0], folder[-2]
    size = good.stat().st_size
    for wrong in (
        PackedImage(good, size + 1, None, lost=False),
        PackedImage(good, size, "0" * 32, lost=False),
        PackedImage(damaged, damaged.stat().st_size, None, lost=False),
        PackedImage(tmp_path / "gone.png", 3, None, lost=False),
    ):
        with pytest.raises(SourceError, match="its pixels cannot be kept"):
            pack_shard(task(tmp_path / "p" / "000000.pack"), ANYWHERE, [wrong], 2)
    assert not list((tmp_path / "p").iterdir())
    lost = pack_shard(
        task(tmp_path / "p" / "000000.pack"), ANYWHERE, [PackedImage(tmp_path / "gone.png", 3, None, lost=True)], 2
    )
    assert lost.num_rows == 1


def test_what_the_encoder_is_told_is_what_the_document_says() -> None:
    document = (ROOT / "docs/cache.md").read_text()
    assert f"Quality is {keep_pixels.QUALITY} with colour at half resolution ({keep_pixels.SUBSAMPLING})" in document
    with Image.open(io.BytesIO(kept(SOURCES["png"][1]))) as image:
        assert image.layer[0][1:3] == (2, 2) and image.layer[1][1:3] == (1, 1)  # 4:2:0, as the file itself says
