"""Sentences about scenes. They say more or less of what is there, in different words, and never what is not."""

import numpy as np

from .scenes import COLOURS, SEEN, SHAPES, Composition, Scene, Thing, generator

_WORDS = {
    "small": ("small", "small", "little", "tiny"),
    "large": ("large", "large", "big"),
    "solid": ("solid", "plain"),
    "striped": ("striped", "striped", "stripy"),
    "dotted": ("dotted", "dotted", "spotted"),
    "checkered": ("checkered",),
    "circle": ("circle", "circle", "circle", "disc"),
    "crescent": ("crescent", "crescent", "crescent", "moon"),
}
"""Other words for the same, the usual one as often as it is listed; what is not here has one word."""

_ALONE = (
    "{a}",
    "{a}",
    "a picture of {a}",
    "there is {a}",
    "{a} by itself",
    "an image that shows {a}",
    "only {a} here",
)
_TWO = {
    "left of": ("{a} to the left of {b}", "{b} to the right of {a}", "{a} on the left, {b} on the right"),
    "above": ("{a} above {b}", "{b} below {a}", "{a} at the top and {b} under it"),
    "inside": ("{a} inside {b}", "{b} with {a} in it", "{b} around {a}"),
    "next to": ("{a} next to {b}", "{a} beside {b}", "{b} next to {a}"),
}
_TWO_ANY = ("{a} and {b}", "{b} and {a}", "a picture of {a} and {b}")
_THREE = ("{two}, and {c}", "{two}; also {c}")
_GROUND = ("{} on a {} background", "{} on a {} ground", "{}, the background is {}")

TEMPLATES = (
    "{}",
    "the {}",
    "one {}",
    "a picture of one {}",
    "there is one {}",
    "one {} by itself",
    "an image that shows one {}",
    "only one {} here",
    "one large {}",
    "one small {}",
    "one solid {}",
    "one striped {}",
    "one dotted {}",
    "one checkered {}",
    "one {} on a dark background",
    "one {} on a light background",
)
"""Prompt templates in the captions' own manner; {} is the class's name."""


def caption(scene: Scene, draw: int = 0) -> str:
    """A true sentence about the scene, lower case, one line.

    Args:
        scene: what is described.
        draw: which of the scene's sentences: other words, other details.
    """
    rng = generator(scene.key, purpose=2, draw=draw)
    phrases = [_phrase(rng, thing, full=i < 2) for i, thing in enumerate(scene.things)]
    if len(phrases) == 1:
        sentence = _pick(rng, _ALONE).format(a=phrases[0])
    elif len(phrases) == 3 and rng.random() < 0.7:
        sentence = _pick(rng, _THREE).format(two=_two(rng, scene, phrases), c=phrases[2])
    else:
        sentence = _two(rng, scene, phrases)
    if len(phrases) == 1 and rng.random() < 0.35:
        tone = "dark" if scene.dark else "light"
        ground = _pick(rng, (tone, scene.background, f"{tone} {scene.background}"))
        sentence = _pick(rng, _GROUND).format(sentence, ground)
    return sentence


def _two(rng: np.random.Generator, scene: Scene, phrases: list[str]) -> str:
    assert scene.relation is not None  # two things always stand in one
    forms = _TWO[scene.relation] if rng.random() < 0.75 else _TWO_ANY
    return _pick(rng, forms).format(a=phrases[0], b=phrases[1])


def _phrase(rng: np.random.Generator, thing: Thing, full: bool) -> str:
    """A thing by some of its properties: colour and shape nearly always, size and texture now and then if `full`."""
    chances = {thing.colour: 0.9}
    if full:
        chances = {thing.size: 0.4, thing.texture: 0.25 if thing.texture == "solid" else 0.5, **chances}
    words = [_word(rng, name) for name, chance in chances.items() if rng.random() < chance]
    words.append(_word(rng, thing.shape) if rng.random() < 0.96 else "shape")
    article = _pick(rng, ("a", "a", "a", "one", "the"))
    if article == "a" and words[0][0] in "aeiou":
        article = "an"
    return " ".join([article, *words])


def _word(rng: np.random.Generator, name: str) -> str:
    return _pick(rng, _WORDS.get(name, (name,)))


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]


def class_id(composition: Composition) -> str:
    """The name of a class's folder and its key in the class file."""
    return "-".join(composition)


def classes(held_out: bool) -> dict[str, list[str]]:
    """Class id -> names, for the compositions that scenes have or for those that they never have."""
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES if ((colour, shape) in SEEN) != held_out]
    return {class_id(pair): [" ".join(pair)] for pair in pairs}
