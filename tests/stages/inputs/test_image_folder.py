"""Which files count as images, in which order, and what their pixels are."""

import io
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from dimefm.cache import InputError
from dimefm.stages.images.decode import AbsentError, ImageError, decode_image
from dimefm.stages.inputs.image_folder import ImageFolder
from dimefm.stages.inputs.image_source import label_images, list_notes

RED, BLUE = (255, 0, 0), (0, 0, 255)


def picture(size: tuple[int, int] = (8, 6)) -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write(path: Path, data: bytes | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(picture(), "PNG") if data is None else data)
    return path


def sources(folder: Path) -> list[str]:
    return [image.source for image in ImageFolder(folder).list()]


def test_rows_are_sorted_by_the_bytes_of_whole_paths(tmp_path: Path) -> None:
    # "-" < "." < "/" < "0": a folder's files lie between the names around it, not in front of or behind all files.
    names = ["a/z.png", "a-b.png", "a.png", "a0.png", "A.png", "é.png", "z.png", "a/b/c.png", "a.b/c.png"]
    for name in names:
        write(tmp_path / name)
    assert sources(tmp_path) == sorted(names, key=os.fsencode)


def test_many_folders_and_files_listed_by_several_threads_come_in_order(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("dimefm.stages.inputs.image_folder.LISTING_THREADS", 2)
    monkeypatch.setattr("dimefm.stages.inputs.image_folder.LISTING_BATCH", 3)
    names = [f"{a}/{b}-{c}/{d}.png" for a in "xy" for b in range(4) for c in "ab" for d in range(5)]
    names += [f"{i}.png" for i in range(40)]
    for name in names:
        write(tmp_path / name, name.encode())
    found = ImageFolder(tmp_path).list()
    assert [image.source for image in found] == sorted(names)
    assert [image.bytes for image in found] == [len(name) for name in sorted(names)]


def test_images_are_told_by_their_suffix_in_any_case(tmp_path: Path) -> None:
    for name in ("a.JPG", "b.jpeg", "c.Png", "d.webp", "notes.txt", "e.gif", "png", "f.jpg.part"):
        write(tmp_path / name, b"x")
    assert sources(tmp_path) == ["a.JPG", "b.jpeg", "c.Png", "d.webp"]


def test_jpegs_by_their_other_names_are_images(tmp_path: Path) -> None:
    names = ["a.jfif", "b.JPE", "c.jif", "d.jfi", "e.pjpeg", "f.pjp", "g.JFIF"]
    for name in names:
        write(tmp_path / name, encoded(picture(), "JPEG"))
    assert sources(tmp_path) == names
    assert decode_image((tmp_path / "a.jfif").read_bytes()).size == (8, 6)


def test_what_is_not_taken_is_counted_by_its_ending_in_one_line(tmp_path: Path) -> None:
    others = ["x.heic", "b/y.HEIC", "z.heic", "u.gif", "v.gif", "w.tif", "no ending", "b/v1.0_a long name", "dot."]
    for name in ["a.png", *others]:
        write(tmp_path / name, b"x")
    found = ImageFolder(tmp_path).list()
    assert [image.source for image in found] == ["a.png"]
    assert list_notes(found, "images.source") == [
        "images.source: 3 .heic, 3 without an ending, 2 .gif, 1 .tif passed over: not JPEG, PNG or WebP"
    ]


def test_many_endings_still_are_one_line(tmp_path: Path) -> None:
    for i in range(20):
        write(tmp_path / f"a.{i}x", b"x")
    write(tmp_path / "a.png")
    (note,) = ImageFolder(tmp_path).list().notes
    assert note.startswith("1 .") and note.endswith("12 of other endings passed over: not JPEG, PNG or WebP")


LITTER = ["._1.png", ".DS_Store", "Thumbs.db", "b/desktop.ini", "b/@eaDir/1.png/thumb.jpg", "__MACOSX/._1.png"]


def test_what_systems_leave_in_folders_is_passed_over_and_counted_in_one_line(tmp_path: Path) -> None:
    for name in ["1.png", *LITTER, ".ipynb_checkpoints/1-checkpoint.png", ".hidden.jpg"]:
        write(tmp_path / name)
    found = ImageFolder(tmp_path).list()
    assert [image.source for image in found] == ["1.png"]
    (note,) = found.notes  # a folder counts as one: nobody looks into it
    assert note == "8 hidden or system files and folders passed over (._*, .DS_Store, Thumbs.db, @eaDir, ...)"
    assert all(ImageFolder(tmp_path).passes_over(name) for name in LITTER)
    assert not any(ImageFolder(tmp_path).passes_over(name) for name in ("1.png", "a/b.c/1.png", "thumbs.db.png"))


def test_litter_in_a_labelled_set_is_no_class(tmp_path: Path) -> None:
    for name in ["n01/a.png", "n01/._a.png", ".ipynb_checkpoints/a.png", "__MACOSX/n01/a.png"]:
        write(tmp_path / name)
    found = label_images(ImageFolder(tmp_path), ["n01"])
    assert [image.source for image in found] == ["n01/a.png"] and len(found.notes) == 1


def test_a_folder_of_other_files_alone_says_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "a.gif", b"x")
    with pytest.raises(InputError, match=r"no image below it; 1 \.gif passed over: .*; wanted files that end in \.jpg"):
        ImageFolder(tmp_path).list()


def test_a_row_knows_its_size_and_time(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", b"12345")
    os.utime(path, ns=(0, 1_234_567_890_123_456_789))
    (found,) = ImageFolder(tmp_path).list()
    assert (found.bytes, found.modified_ns, found.problem) == (5, 1_234_567_890_123_456_789, None)


def test_links_to_folders_are_followed_and_a_loop_ends_quietly(tmp_path: Path) -> None:
    write(tmp_path / "outside" / "x.png")
    images = tmp_path / "images"
    write(images / "a" / "y.png")
    (images / "elsewhere").symlink_to(tmp_path / "outside")
    (images / "a" / "up").symlink_to(images)
    (images / "self").symlink_to(images / "self")
    assert sources(images) == ["a/y.png", "elsewhere/x.png"]


def test_what_is_no_readable_file_is_a_row_with_a_problem(tmp_path: Path) -> None:
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    assert [(image.source, image.problem) for image in ImageFolder(tmp_path).list()] == [
        ("broken.png", "broken link"),
        ("pipe.png", "not a regular file"),
    ]


def test_a_name_that_is_not_utf8_is_a_row_with_a_problem(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes(b"x")
    (found,) = ImageFolder(tmp_path).list()
    assert (found.source, found.problem) == ("caf\\xe9.png", "file name is not UTF-8")
    found.source.encode()  # a table of rows takes it


def test_folders_may_be_nested_deeper_than_python_recurses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(400):
        Path("d").mkdir()
        os.chdir("d")
    write(Path("x.png"))
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(300)
        found = sources(tmp_path)
    finally:
        sys.setrecursionlimit(limit)
    assert found == ["d/" * 400 + "x.png"]


def test_a_missing_an_empty_and_a_wrong_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "file.png")
    for name, words in (("missing", "no such folder"), ("empty", "no image below it"), ("file.png", "not a folder")):
        with pytest.raises(InputError, match=f"{name}: {words}"):
            ImageFolder(tmp_path / name).list()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_image_that_may_not_be_read_is_absent_and_not_broken(tmp_path: Path) -> None:
    write(tmp_path / "a.png").chmod(0)
    with pytest.raises(AbsentError, match="permission denied"):
        ImageFolder(tmp_path).read("a.png")


def test_an_image_that_is_not_there_is_absent_and_a_folder_in_its_place_is_none(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    write(tmp_path / "file.png")
    for name in ("none.png", "nowhere/none.png", "file.png/none.png"):
        with pytest.raises(AbsentError, match="gone"):
            ImageFolder(tmp_path).read(name)
    with pytest.raises(ImageError, match="not a regular file") as caught:
        ImageFolder(tmp_path).read("folder.png")
    assert not isinstance(caught.value, AbsentError)


def test_a_labelled_image_has_its_first_folder_as_class(tmp_path: Path) -> None:
    write(tmp_path / "n02" / "deep" / "b.png")
    write(tmp_path / "n01" / "a.png")
    found = label_images(ImageFolder(tmp_path), ["n01", "n02", "n03"])
    assert [(image.source, image.class_id) for image in found] == [("n01/a.png", "n01"), ("n02/deep/b.png", "n02")]


def test_images_outside_of_the_classes_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("n01/a.png", "n09/a.png", "loose.png"):
        write(tmp_path / name)
    with pytest.raises(InputError, match=r"loose\.png, n09: not a class id"):
        label_images(ImageFolder(tmp_path), ["n01"])


def test_pixels_are_upright_whatever_the_exif_orientation() -> None:
    # Orientation 6: the camera was turned, the picture has to be turned by 90 degrees clockwise to be upright.
    exif = Image.Exif()
    exif[0x0112] = 6
    image = decode_image(encoded(picture((8, 6)), "PNG", exif=exif))
    assert image.size == (6, 8)
    assert (image.getpixel((0, 0)), image.getpixel((0, 7))) == (RED, BLUE)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_turns_it(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.effect_noise((7, 5), 90).convert("RGB"), "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(decode_image(data)), np.asarray(expected))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_cost_the_image() -> None:
    data = encoded(picture(), "JPEG", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff" + b"\xee" * 20)
    assert decode_image(data).size == (8, 6)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    grey = Image.fromarray(np.array([[0, 255, 256, 32768, 65535]], np.uint16))
    pixels = np.asarray(decode_image(encoded(grey, "PNG")))
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_palette_alpha_grey_bilevel_and_cmyk_become_rgb() -> None:
    transparent = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    palette = picture().quantize(4)
    for data, expected in (
        (encoded(transparent, "PNG"), (10, 20, 30)),  # alpha is dropped, as open_clip does
        (encoded(palette, "PNG"), RED),
        (encoded(palette, "PNG", transparency=bytes([255, 0, 128, 255])), RED),
        (encoded(Image.new("LA", (4, 4), (77, 5)), "PNG"), (77, 77, 77)),
        (encoded(Image.new("1", (4, 4), 1), "PNG"), (255, 255, 255)),
        (encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG", quality=100), (254, 0, 0)),
    ):
        image = decode_image(data)
        assert image.mode == "RGB"
        assert np.allclose(image.getpixel((0, 0)), expected, atol=3)


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert decode_image(data).getpixel((4, 4)) == RED


def test_a_wrong_extension_among_the_three_formats_does_no_harm(tmp_path: Path) -> None:
    path = write(tmp_path / "really_a_png.jpg")
    assert decode_image(path.read_bytes()).getpixel((0, 0)) == RED


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1)])
def test_the_smallest_and_the_longest_images_are_read(size: tuple[int, int]) -> None:
    assert decode_image(encoded(Image.new("RGB", size), "PNG")).size == size


def bomb() -> bytes:
    """A PNG of a few bytes that claims 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


NOISE = Image.effect_noise((64, 64), 90).convert("RGB")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"GIF89a" + b"\0" * 100, "not a JPEG, PNG or WebP image"),
        (b"<html>404</html>", "not a JPEG, PNG or WebP image"),
        (encoded(NOISE, "JPEG")[:1500], "truncated"),
        (encoded(NOISE, "PNG")[:6000], "truncated"),
        (encoded(NOISE, "WEBP")[:900], "damaged"),
        (bomb(), "decompression bomb"),
    ],
    ids=["empty", "gif", "html", "cut jpeg", "cut png", "cut webp", "bomb"],
)
def test_an_unreadable_image_has_a_short_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    assert str(caught.value) == reason


def test_every_flipped_byte_gives_an_image_or_a_reason() -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        data = bytearray(encoded(picture((16, 16)), kind))
        for position in range(len(data)):
            damaged = bytes(data[:position]) + bytes([data[position] ^ 0x55]) + bytes(data[position + 1 :])
            try:
                assert decode_image(damaged).mode == "RGB"
            except ImageError as error:
                assert len(str(error)) < 40


def test_a_file_that_vanished_is_gone_and_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="gone"):
        ImageFolder(tmp_path).read("vanished.png")
    with pytest.raises(ImageError, match="not a regular file"):
        ImageFolder(tmp_path).read("")
