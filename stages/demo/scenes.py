"""Made-up scenes for the demo: what is in a picture, described before it is drawn.

A scene is a description; `scene_pictures.draw` makes the picture and `scene_captions.caption` the sentences, so that
what a sentence claims can be checked against the description. Every random choice comes from a generator keyed by
(seed, source, row): row 4,711 is the same scene whether or not the 4,710 before it were made.
"""

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "crescent")
TEXTURES = ("solid", "striped", "dotted", "checkered")
SIZES = ("small", "large")
BACKGROUNDS = ("plain", "shaded", "speckled", "cloudy", "tiled")
RELATIONS = ("left of", "above", "inside", "next to")

Composition = tuple[str, str]
"""(colour, shape): what a class of the demo is."""

COMPOSITIONS: tuple[Composition, ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
HELD_OUT: frozenset[Composition] = frozenset(
    (colour, SHAPES[(3 * i + offset) % len(SHAPES)]) for i, colour in enumerate(COLOURS) for offset in (0, 2, 5)
)
"""Compositions that no scene has unless asked for: each colour and each shape three times, so that neither tells."""
SEEN: tuple[Composition, ...] = tuple(pair for pair in COMPOSITIONS if pair not in HELD_OUT)

_RADIUS = {"small": (0.17, 0.22), "large": (0.28, 0.36)}
_RADIUS_AMONG_OTHERS = {"small": (0.12, 0.145), "large": (0.19, 0.23)}
_RADIUS_AROUND = (0.30, 0.36)
_HOLDS_OTHERS = ("circle", "square", "ring", "heart")
_TURN_DEGREES = 30.0


class Source(IntEnum):
    """Independent sources of scenes: no two of them share a random number."""

    IMAGES = 1
    SENTENCES = 2
    PAIRS = 3
    DEV = 4
    TEST = 5
    HELD_OUT = 6


@dataclass(frozen=True, slots=True)
class Thing:
    """One object. Lengths are in picture sides from the upper left corner, y runs down, `turn` is in degrees."""

    size: str
    texture: str
    colour: str
    shape: str
    x: float
    y: float
    radius: float
    turn: float


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows. `relation` holds from `things[0]` to `things[1]`; with one thing it is None."""

    things: tuple[Thing, ...]
    relation: str | None
    background: str
    dark: bool
    num_clutter: int
    occluded: bool
    key: tuple[int, int, int]
    """(seed, source, row): the picture's noise and the captions' wording are drawn from it."""


def generator(key: tuple[int, int, int], purpose: int, draw: int = 0) -> np.random.Generator:
    """The random numbers of one use of one scene.

    Args:
        key: (seed, source, row) of the scene.
        purpose: 0 the description, 1 the picture, 2 the captions.
        draw: which of several independent draws for that purpose.
    """
    seed, source, row = key
    # Philox counts blocks in the lowest word, so words 1 to 3 are free to tell rows and draws apart.
    return np.random.Generator(np.random.Philox(key=[seed, 16 * source + purpose], counter=[0, draw, row, 0]))


def make_scene(
    seed: int, source: Source, row: int, subject: Composition | None = None, num_things: int | None = None
) -> Scene:
    """The scene of one row.

    Args:
        seed: of the whole demo, 0 <= seed < 2**63.
        source: which source of scenes.
        row: which scene of it.
        subject: the first thing's (colour, shape); None draws one that is not held out.
        num_things: 1, 2 or 3; None draws it.
    """
    key = (seed, int(source), row)
    rng = generator(key, purpose=0)
    if num_things is None:
        num_things = int(rng.choice((1, 2, 3), p=(0.6, 0.3, 0.1)))
    relation = None if num_things == 1 else str(rng.choice(RELATIONS))
    first = subject or SEEN[rng.integers(len(SEEN))]
    compositions = [first, *_others(rng, first, num_things - 1)]
    if relation == "inside":
        holders = [pair for pair in SEEN if pair[1] in _HOLDS_OTHERS and pair[0] != first[0]]
        compositions[1] = holders[rng.integers(len(holders))]
    return Scene(
        things=_place(rng, compositions, relation),
        relation=relation,
        background=str(rng.choice(BACKGROUNDS)),
        dark=bool(rng.random() < 0.5),
        num_clutter=int(rng.integers(0, 7)),
        occluded=bool(rng.random() < 0.2),
        key=key,
    )


def _others(rng: np.random.Generator, first: Composition, count: int) -> list[Composition]:
    """`count` seen compositions that differ from `first` and from each other in colour and in shape."""
    chosen = [first]
    while len(chosen) <= count:
        pair = SEEN[rng.integers(len(SEEN))]
        if all(pair[0] != colour and pair[1] != shape for colour, shape in chosen):
            chosen.append(pair)
    return chosen[1:]


def _place(rng: np.random.Generator, compositions: list[Composition], relation: str | None) -> tuple[Thing, ...]:
    """Sizes, textures and places for the things, drawn again until they keep apart and the relation is plain to see."""
    textures = [str(rng.choice(TEXTURES)) for _ in compositions]
    while True:
        sizes = [str(rng.choice(SIZES)) for _ in compositions]
        ranges = [(_RADIUS if relation is None else _RADIUS_AMONG_OTHERS)[size] for size in sizes]
        if relation == "inside":
            sizes[:2] = ["small", "large"]
            ranges[:2] = [_RADIUS_AMONG_OTHERS["small"], _RADIUS_AROUND]
        radii = [float(rng.uniform(*bounds)) for bounds in ranges]
        places = [rng.uniform(radius + 0.03, 0.97 - radius, size=2) for radius in radii]
        if relation == "inside":
            places[0] = places[1] + rng.uniform(-0.03, 0.03, size=2)
        things = tuple(
            Thing(size, texture, *pair, float(x), float(y), radius, float(rng.uniform(-_TURN_DEGREES, _TURN_DEGREES)))
            for size, texture, pair, (x, y), radius in zip(sizes, textures, compositions, places, radii)
        )
        if holds(relation, things) and _apart(things, relation):
            return things


def holds(relation: str | None, things: tuple[Thing, ...]) -> bool:
    """Whether `things[0]` stands in this relation to `things[1]`, by a margin that an eye would grant."""
    if relation is None:
        return len(things) == 1
    a, b = things[0], things[1]
    dx, dy = b.x - a.x, b.y - a.y
    if relation == "left of":
        return dx > 1.2 * abs(dy)
    if relation == "above":
        return dy > 1.2 * abs(dx)
    if relation == "next to":
        return abs(dx) > 1.2 * abs(dy) and math.hypot(dx, dy) < 1.5 * (a.radius + b.radius)
    return math.hypot(dx, dy) + 0.7 * a.radius < 0.5 * b.radius


def _apart(things: tuple[Thing, ...], relation: str | None) -> bool:
    """Whether no thing covers another, but for the one that is meant to lie inside."""
    pairs = [(a, b) for i, a in enumerate(things) for b in things[i + 1 :]]
    if relation == "inside":
        pairs = pairs[1:]
    return all(math.hypot(a.x - b.x, a.y - b.y) > 0.95 * (a.radius + b.radius) for a, b in pairs)
