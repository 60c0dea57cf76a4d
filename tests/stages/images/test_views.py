"""Views: a function of their key, of torchvision's distribution, inside the image, and cheap for large JPEGs."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from dimefm.stages.counter_random import uniforms
from dimefm.stages.images.crops import NUM_UNIFORMS, crop_box, is_flipped, resample_filter
from dimefm.stages.images.decode import ImageError, decode_image
from dimefm.stages.images.jpeg import OpenJpeg
from dimefm.stages.images.views import ViewMaker, jpeg_reduction, make_views
from dimefm.stages.settings.distill import AugmentSettings

RATIO = (0.75, 4 / 3)
WHOLE = AugmentSettings(scale=(1.0, 1.0), ratio=(1.0, 1.0))


def numbers(count, key=0):
    return uniforms(key, np.arange(count), np.zeros(count, dtype=np.int64), NUM_UNIFORMS).tolist()


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(width, height):
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, 255 - across], axis=2).astype(np.uint8))


def views(settings, size=16):
    return ViewMaker(settings, size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("scale", [(0.65, 1.0), (0.08, 1.0)])
@pytest.mark.parametrize(("width", "height"), [(500, 375), (64, 64), (200, 700)])
def test_crops_have_the_distribution_of_torchvisions(width, height, scale):
    boxes = np.array([crop_box(width, height, scale, RATIO, one) for one in numbers(4000)])
    mine = np.stack([boxes[:, 0], boxes[:, 1], boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]], axis=1)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(RATIO)) for _ in range(4000)])
    theirs = theirs[:, [1, 0, 3, 2]]  # they say (top, left, height, width)
    # Means of 4,000 draws each: six standard errors of their difference. Spreads: within a tenth.
    error = np.sqrt((mine.var(axis=0) + theirs.var(axis=0)) / 4000)
    assert (np.abs(mine.mean(axis=0) - theirs.mean(axis=0)) <= 6 * error + 1e-9).all()
    np.testing.assert_allclose(mine.std(axis=0), theirs.std(axis=0), rtol=0.1, atol=0.05)


@pytest.mark.parametrize(("width", "height"), [(1, 10_000), (10_000, 1), (1, 1), (3, 2), (640, 480)])
@pytest.mark.parametrize("ratio", [RATIO, (4.0, 5.0), (0.1, 0.2)])
def test_crops_stay_inside_and_are_never_empty(width, height, ratio):
    for one in numbers(300):
        left, top, right, bottom = crop_box(width, height, (0.08, 1.0), ratio, one)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_what_no_crop_fits_is_cropped_in_the_middle():
    # A line 10,000 high: no crop of a ratio of at least 3/4 fits, the largest has 1 x round(1 / .75).
    assert crop_box(1, 10_000, (0.65, 1.0), RATIO, numbers(1)[0]) == (0, 4999, 1, 5000)


def test_the_same_key_makes_the_same_view_and_another_key_another():
    data, maker = encoded(noise(40, 30)), views(AugmentSettings())
    first, second = numbers(2)
    assert (maker.view(data, first) == maker.view(data, first)).all()
    assert not (maker.view(data, first) == maker.view(data, second)).all()


def test_the_whole_image_at_its_own_size_comes_back_untouched():
    image = noise(16, 16)
    view = views(WHOLE).view(encoded(image, "PNG"), numbers(1)[0])
    assert view.dtype == np.uint8 and (view == np.asarray(image)).all()


def test_half_of_the_views_are_mirrored_and_only_where_that_is_on():
    image, many = noise(16, 16), numbers(1000)
    data, pixels = encoded(image, "PNG"), np.asarray(image)
    flipping = views(WHOLE.model_copy(update={"flip": True}))
    assert 400 < sum(map(is_flipped, many)) < 600
    for one in many[:10]:
        assert (flipping.view(data, one) == (pixels[:, ::-1] if is_flipped(one) else pixels)).all()
        assert (views(WHOLE).view(data, one) == pixels).all()


def test_a_jpeg_keeps_twice_the_pixels_of_its_view():
    assert [jpeg_reduction((0, 0, side, side), 32) for side in (64, 127, 128, 255, 256, 512, 9000)] == [
        1, 1, 2, 2, 4, 8, 8,
    ]  # fmt: skip
    assert jpeg_reduction((0, 0, 9000, 100), 32) == 1  # the shorter side decides


@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_a_large_jpeg_decoded_small_shows_the_same_view(orientation):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    photo = Image.blend(smooth(1600, 1200), noise(1600, 1200), 0.2)
    large = encoded(photo, quality=95, exif=exif)
    exact = encoded(photo, "PNG", exif=exif)
    for one in numbers(3):
        difference = views(AugmentSettings()).view(large, one).astype(int) - views(AugmentSettings()).view(exact, one)
        assert np.abs(difference).max() <= 6  # of 255


@pytest.mark.parametrize("orientation", [None, 1, 2, 3, 4, 5, 6, 7, 8])
def test_a_box_of_the_upright_picture_is_found_in_the_stored_one(orientation):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    data = encoded(noise(41, 30), exif=exif)
    jpeg = OpenJpeg.open(data)
    upright = decode_image(data)
    assert jpeg.size == upright.size
    stored, factor = jpeg.decode(1)
    part = stored.crop(jpeg.stored_box((3, 5, 20, 17)))
    assert factor == 1
    turned = part if jpeg.turn is None else part.transpose(jpeg.turn)
    assert (np.asarray(turned) == np.asarray(upright.crop((3, 5, 20, 17)))).all()


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_reduced_jpeg_is_cropped_where_the_crop_lies_to_a_part_of_a_pixel(orientation):
    # 1,601 is no multiple of 8: the last reduced pixel covers one pixel of the photo and seven beyond its edge.
    exif = Image.Exif()
    exif[0x0112] = orientation
    ramp = np.linspace(0, 255, 1601)[None, :, None].repeat(1201, axis=0).repeat(3, axis=2)
    photo = Image.fromarray(ramp.astype(np.uint8))
    small, exact = (
        views(WHOLE).view(encoded(photo, kind, exif=exif, **options), numbers(1)[0]).astype(float)
        for kind, options in (("JPEG", {"quality": 100}), ("PNG", {}))
    )
    # A crop that is off by 7/8 of a reduced pixel at one end shifts the ramp's mean by 0.5.
    assert abs((small - exact).mean()) < 0.2


def test_views_of_several_kinds_have_the_bytes_they_have_alone_whatever_they_share():
    files = [encoded(noise(1600, 1200)), encoded(noise(300, 200)), encoded(noise(64, 48), "PNG")]
    kinds = [views(AugmentSettings(), 16), views(AugmentSettings(), 60), views(AugmentSettings(flip=True), 16)]
    kinds += [views(AugmentSettings(preset="paper"), 100)]
    for data in files:
        for one in numbers(4):
            together = make_views(kinds, data, one)
            assert all((view == kind.view(data, one)).all() for view, kind in zip(together, kinds))


def test_an_image_is_decoded_once_for_each_size_that_its_views_can_do_with(monkeypatch):
    decoded = []
    decode = OpenJpeg.decode
    monkeypatch.setattr(OpenJpeg, "decode", lambda jpeg, by: decoded.append(by) or decode(jpeg, by))
    make_views([views(WHOLE, 16), views(WHOLE, 17), views(WHOLE, 100)], encoded(noise(800, 800)), numbers(1)[0])
    assert decoded == [8, 4]  # 800 / (2 * 16) and / (2 * 17) allow 8, / (2 * 100) allows 4


def test_a_view_follows_the_exif_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6
    view = views(WHOLE).view(encoded(smooth(16, 16), "PNG", exif=exif), numbers(1)[0])
    assert (view == np.rot90(np.asarray(smooth(16, 16)), -1)).all()


@pytest.mark.parametrize("size", [(40, 30), (1600, 1200)])
def test_a_cut_file_is_an_image_error(size):
    data = encoded(noise(*size))
    with pytest.raises(ImageError):
        views(AugmentSettings()).view(data[: len(data) // 2], numbers(1)[0])


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpegs_that_are_not_rgb_become_so(mode):
    data = encoded(noise(1200, 900).convert(mode))
    assert views(AugmentSettings()).view(data, numbers(1)[0]).shape == (16, 16, 3)


def test_the_filter_is_the_teachers():
    assert resample_filter("bilinear") == Image.Resampling.BILINEAR
    assert resample_filter("bicubic") == resample_filter("random") == Image.Resampling.BICUBIC
