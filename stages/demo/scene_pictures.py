"""Draws scenes: Pillow and NumPy, antialiased by drawing masks at a multiple of the size."""

import colorsys
import io
import math

import numpy as np
from PIL import Image, ImageDraw

from .scenes import Scene, Thing, generator

_OVERSAMPLE = 4
_HUE_DEGREES = {
    "red": 0,
    "orange": 27,
    "yellow": 53,
    "green": 125,
    "cyan": 183,
    "blue": 225,
    "purple": 274,
    "pink": 322,
}
_HUE_JITTER_DEGREES = 6.0
_JPEG_QUALITY = 90

Rgb = tuple[int, int, int]


def _regular(num_points: int, inner: float = 1.0) -> np.ndarray:
    """(num_points, 2) corners on the unit circle from the top; every other one at radius `inner`."""
    angles = 2 * np.pi * np.arange(num_points) / num_points
    radii = np.where(np.arange(num_points) % 2, inner, 1.0)
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2.5], axis=1) / 15.5


def _crescent() -> np.ndarray:
    outer = np.linspace(np.radians(40), np.radians(320), 40)
    tip_x, tip_y = np.cos(outer[0]), np.sin(outer[0])
    centre = 0.62
    radius = math.hypot(tip_x - centre, tip_y)
    half = math.atan2(tip_y, tip_x - centre)
    inner = np.linspace(2 * np.pi - half, half, 30)
    arcs = [(np.cos(outer), np.sin(outer)), (centre + radius * np.cos(inner), radius * np.sin(inner))]
    return np.concatenate([np.stack(arc, axis=1) for arc in arcs]) + np.array([0.2, 0.0])


def _cross(arm: float = 0.36) -> np.ndarray:
    quarter = np.array([[arm, -1.0], [arm, -arm], [1.0, -arm]])
    turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, i) for i in range(4)])


_OUTLINES: dict[str, np.ndarray] = {
    "circle": 0.92 * _regular(64),
    "square": 0.83 * np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]),
    "triangle": 1.12 * _regular(3, inner=1.0) + [0.0, 0.12],
    "star": 1.12 * _regular(10, inner=0.45),
    "ring": _regular(64),
    "cross": _cross(),
    "heart": _heart(),
    "crescent": 1.05 * _crescent(),
}
"""Corners in units of the thing's radius; about equally large to the eye."""
_RING_HOLE = 0.55 * _regular(64)


def draw(scene: Scene, size: int = 64) -> Image.Image:
    """The scene's picture: RGB, `size` x `size` pixels; the same pixels every time."""
    rng = generator(scene.key, purpose=1)
    image = Image.fromarray(_background(rng, scene, size))
    for _ in range(scene.num_clutter):
        _paste(image, _scrap(rng), _any_colour(rng))
    for thing in scene.things[::-1]:  # the first thing may lie inside the second: it is drawn over it
        _paste_thing(image, thing, rng)
    if scene.occluded:
        _paste(image, _bar_across(rng, scene.things[0]), _muted_colour(rng, scene.dark))
    return Image.fromarray(_as_if_photographed(rng, np.asarray(image)))


def jpeg_bytes(image: Image.Image) -> bytes:
    """The picture as a JPEG file."""
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=_JPEG_QUALITY)
    return stream.getvalue()


def _background(rng: np.random.Generator, scene: Scene, size: int) -> np.ndarray:
    """(size, size, 3) uint8."""
    low, high = (np.array(_muted_colour(rng, scene.dark), dtype=np.float32) for _ in range(2))
    at = np.arange(size, dtype=np.float32) / size
    if scene.background == "shaded":
        angle = rng.uniform(0, 2 * math.pi)
        share = (at[:, None] - 0.5) * math.sin(angle) + (at[None, :] - 0.5) * math.cos(angle) + 0.5
    elif scene.background == "cloudy":
        blobs = Image.fromarray(rng.integers(0, 256, size=(5, 5), dtype=np.uint8))
        share = np.asarray(blobs.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    elif scene.background == "tiled":
        tile = rng.uniform(0.1, 0.2)
        share = ((np.floor(at[:, None] / tile) + np.floor(at[None, :] / tile)) % 2).astype(np.float32)
    elif scene.background == "speckled":
        share = (rng.random((size, size)) < 0.25).astype(np.float32)
    else:
        share = np.zeros((size, size), dtype=np.float32)
    if scene.background in ("tiled", "speckled", "cloudy"):  # two tones that happen to agree would show nothing
        high = np.clip(low + (45 if low.mean() < 128 else -45), 0, 255)
    elif scene.background == "shaded":
        high = np.clip(high + (60 if low.mean() < 128 else -60), 0, 255)
    return (low + (high - low) * np.clip(share, 0, 1)[..., None]).astype(np.uint8)


def _paste_thing(image: Image.Image, thing: Thing, rng: np.random.Generator) -> None:
    hue = _HUE_DEGREES[thing.colour] + rng.uniform(-_HUE_JITTER_DEGREES, _HUE_JITTER_DEGREES)
    saturation = rng.uniform(0.5, 0.62) if thing.colour == "pink" else rng.uniform(0.75, 1.0)
    value = rng.uniform(0.55, 0.8) if thing.colour in ("green", "purple") else rng.uniform(0.8, 1.0)
    colour = _rgb(hue, saturation, value)
    lighter = rng.random() < 0.5
    tone = _rgb(hue, 0.4 * saturation, 1.0) if lighter else _rgb(hue, saturation, 0.5 * value)
    hole = _corners(_RING_HOLE, thing) if thing.shape == "ring" else None
    corners = _corners(_OUTLINES[thing.shape], thing)
    _paste(image, corners, colour, hole)
    if thing.texture != "solid":
        period = thing.radius * rng.uniform(0.5, 0.65)
        _paste(image, corners, tone, hole, texture=thing.texture, period=period, turn=rng.uniform(0, 180))


def _corners(outline: np.ndarray, thing: Thing) -> np.ndarray:
    """(points, 2) in picture sides: the outline turned, scaled and moved."""
    sine, cosine = math.sin(math.radians(thing.turn)), math.cos(math.radians(thing.turn))
    return outline @ np.array([[cosine, sine], [-sine, cosine]]) * thing.radius + [thing.x, thing.y]


def _paste(
    image: Image.Image,
    corners: np.ndarray,
    colour: Rgb,
    hole: np.ndarray | None = None,
    texture: str | None = None,
    period: float = 1.0,
    turn: float = 0.0,
) -> None:
    """Fill a polygon, less its hole and the gaps of its texture, with a colour; its edges are antialiased."""
    size = image.width
    left, top = np.clip(np.floor(corners.min(axis=0) * size).astype(int), 0, size - 1)
    right, bottom = np.clip(np.ceil(corners.max(axis=0) * size).astype(int), 1, size)
    if right <= left or bottom <= top:
        return
    mask = Image.new("L", (_OVERSAMPLE * (right - left), _OVERSAMPLE * (bottom - top)))
    pen = ImageDraw.Draw(mask)
    for points, ink in ((corners, 255), (hole, 0)):
        if points is not None:
            pen.polygon([tuple(point) for point in (points * size - [left, top]) * _OVERSAMPLE], fill=ink)
    if texture is not None:
        mask = Image.fromarray(np.asarray(mask) * _pattern(texture, mask.size, period * size * _OVERSAMPLE, turn))
    image.paste(colour, (left, top, right, bottom), mask.reduce(_OVERSAMPLE))


def _pattern(texture: str, shape: tuple[int, int], period: float, turn: float) -> np.ndarray:
    """(height, width) uint8, 1 where the second tone goes. `period` is in pixels of the mask."""
    x, y = np.arange(shape[0], dtype=np.float32) / period, np.arange(shape[1], dtype=np.float32)[:, None] / period
    sine, cosine = math.sin(math.radians(turn)), math.cos(math.radians(turn))
    along, across = cosine * x + sine * y, cosine * y - sine * x
    if texture == "striped":
        return (along % 1 < 0.5).astype(np.uint8)
    if texture == "checkered":
        return ((np.floor(1.25 * along) + np.floor(1.25 * across)) % 2).astype(np.uint8)
    return (((along % 1 - 0.5) ** 2 + (across % 1 - 0.5) ** 2) < 0.1).astype(np.uint8)


def _scrap(rng: np.random.Generator) -> np.ndarray:
    """(4, 2) corners of a small chip or of a thin line."""
    centre = rng.uniform(0, 1, size=2)
    if rng.random() < 0.5:
        length, width = rng.uniform(0.2, 0.7), rng.uniform(0.008, 0.02)
    else:
        length, width = rng.uniform(0.02, 0.05), rng.uniform(0.02, 0.05)
    return _oblong(centre, length, width, rng.uniform(0, math.pi))


def _bar_across(rng: np.random.Generator, thing: Thing) -> np.ndarray:
    """(4, 2) corners of a bar over part of the thing."""
    centre = np.array([thing.x, thing.y]) + rng.uniform(-0.5, 0.5, size=2) * thing.radius
    return _oblong(centre, 2.4 * thing.radius, rng.uniform(0.15, 0.3) * thing.radius, rng.uniform(0, math.pi))


def _oblong(centre: np.ndarray, length: float, width: float, angle: float) -> np.ndarray:
    along = np.array([math.cos(angle), math.sin(angle)]) * length / 2
    across = np.array([-math.sin(angle), math.cos(angle)]) * width / 2
    return centre + np.stack([along + across, along - across, -along - across, -along + across])


def _as_if_photographed(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Light, contrast and noise that differ from picture to picture. (H, W, 3) uint8 in and out."""
    gain, lift = rng.uniform(0.85, 1.1), rng.uniform(-12, 12)
    noise = rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(rng.uniform(1, 7))
    return np.clip(pixels * np.float32(gain) + np.float32(lift) + noise, 0, 255).astype(np.uint8)


def _muted_colour(rng: np.random.Generator, dark: bool) -> Rgb:
    return _rgb(
        rng.uniform(0, 360), rng.uniform(0.0, 0.4), rng.uniform(0.08, 0.38) if dark else rng.uniform(0.65, 0.97)
    )


def _any_colour(rng: np.random.Generator) -> Rgb:
    return _rgb(rng.uniform(0, 360), rng.uniform(0.0, 1.0), rng.uniform(0.2, 1.0))


def _rgb(hue_degrees: float, saturation: float, value: float) -> Rgb:
    red, green, blue = colorsys.hsv_to_rgb(hue_degrees / 360 % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)
