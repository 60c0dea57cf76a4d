"""Scenes: the same every time, true to their description, and not to be told apart by pixels alone."""

import re
from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from dimefm.stages.demo.scene_captions import caption
from dimefm.stages.demo.scene_pictures import draw, jpeg_bytes
from dimefm.stages.demo.scenes import COLOURS, HELD_OUT, RELATIONS, SHAPES, SIZES, TEXTURES, Source, make_scene

SAME = {"little": "small", "tiny": "small", "big": "large", "plain": "solid", "stripy": "striped", "spotted": "dotted"}
SAME |= {"disc": "circle", "moon": "crescent"}
NOUN = f"(?:{'|'.join([*SHAPES, 'disc', 'moon', 'shape'])})"
PROPERTY = f"(?:{'|'.join([*COLOURS, *TEXTURES, *SIZES, *SAME])})"
PHRASE = re.compile(rf"(?:a|an|one|the) ((?:{PROPERTY} )*{NOUN})\b")
SCENES = [make_scene(7, Source.SENTENCES, row) for row in range(1500)]


def mentions(sentence):
    """What each noun phrase of a sentence says, in the sentence's order, and the sentence with those left out."""
    found = [{SAME.get(word, word) for word in match.split()} - {"shape"} for match in PHRASE.findall(sentence)]
    return found, PHRASE.sub("#", sentence)


def fits(said, thing):
    return said <= {thing.size, thing.texture, thing.colour, thing.shape}


def test_a_row_gives_the_same_bytes_whatever_was_drawn_before():
    alone = jpeg_bytes(draw(make_scene(3, Source.IMAGES, 11)))
    in_turn = [jpeg_bytes(draw(make_scene(3, Source.IMAGES, row))) for row in range(12)]
    assert in_turn[11] == alone
    assert len(set(in_turn)) == 12


@pytest.mark.parametrize("other", [(4, Source.IMAGES, 11), (3, Source.PAIRS, 11), (3, Source.IMAGES, 12)])
def test_seed_source_and_row_each_make_another_scene(other):
    assert make_scene(*other).things != make_scene(3, Source.IMAGES, 11).things


def test_a_picture_is_rgb_of_the_size_asked_for():
    scene = make_scene(0, Source.IMAGES, 0)
    assert (draw(scene).mode, draw(scene).size, draw(scene, size=96).size) == ("RGB", (64, 64), (96, 96))


def test_every_property_occurs():
    things = [thing for scene in SCENES for thing in scene.things]
    assert {thing.colour for thing in things} == set(COLOURS)
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.texture for thing in things} == set(TEXTURES)
    assert {thing.size for thing in things} == set(SIZES)
    assert {scene.relation for scene in SCENES} == {None, *RELATIONS}


def test_held_out_compositions_favour_no_colour_and_no_shape():
    assert set(Counter(colour for colour, _ in HELD_OUT).values()) == {3}
    assert set(Counter(shape for _, shape in HELD_OUT).values()) == {3}


@pytest.mark.parametrize("source", [Source.IMAGES, Source.SENTENCES, Source.PAIRS])
def test_no_scene_has_a_held_out_composition_unasked(source):
    scenes = (make_scene(0, source, row) for row in range(1500))
    assert not {(thing.colour, thing.shape) for scene in scenes for thing in scene.things} & HELD_OUT


def test_a_scene_has_the_subject_that_was_asked_for():
    for row, (colour, shape) in enumerate(sorted(HELD_OUT)):
        (thing,) = make_scene(0, Source.HELD_OUT, row, (colour, shape), num_things=1).things
        assert (thing.colour, thing.shape) == (colour, shape)


def test_things_lie_within_the_picture():
    for scene in SCENES:
        for thing in scene.things[:1] if scene.relation == "inside" else scene.things:
            assert thing.radius <= thing.x <= 1 - thing.radius
            assert thing.radius <= thing.y <= 1 - thing.radius


def test_a_large_solid_thing_shows_its_colour():
    hues = {"red": (0, 0), "green": (1, 1), "blue": (2, 2), "yellow": (0, 1), "cyan": (2, 1)}  # brightest channels
    seen = 0
    for scene in SCENES:
        thing = scene.things[0]
        if scene.relation or scene.occluded or (thing.texture, thing.shape) != ("solid", "square"):
            continue
        if thing.colour in hues:
            x, y = int(64 * thing.x), int(64 * thing.y)
            pixel = np.asarray(draw(scene), dtype=int)[y - 1 : y + 2, x - 1 : x + 2].mean(axis=(0, 1))
            assert pixel.argmax() in hues[thing.colour]
            seen += 1
    assert seen >= 5


def test_every_phrase_of_a_caption_fits_a_thing_of_its_own():
    for scene in SCENES:
        for n in range(2):
            said, _ = mentions(caption(scene, n))
            assert 1 <= len(said) <= len(scene.things)
            orders = permutations(scene.things, len(said))
            assert any(all(map(fits, said, order)) for order in orders), caption(scene, n)


def test_a_caption_names_a_relation_the_way_round_that_the_picture_has_it():
    geometry = {  # from the first phrase to the second; y runs down
        "# to the left of #": lambda a, b: a.x < b.x,
        "# to the right of #": lambda a, b: a.x > b.x,
        "# on the left, # on the right": lambda a, b: a.x < b.x,
        "# above #": lambda a, b: a.y < b.y,
        "# below #": lambda a, b: a.y > b.y,
        "# at the top and # under it": lambda a, b: a.y < b.y,
        "# inside #": lambda a, b: a.radius < b.radius and np.hypot(a.x - b.x, a.y - b.y) < b.radius / 2,
        "# with # in it": lambda a, b: a.radius > b.radius and np.hypot(a.x - b.x, a.y - b.y) < a.radius / 2,
        "# around #": lambda a, b: a.radius > b.radius and np.hypot(a.x - b.x, a.y - b.y) < a.radius / 2,
        "# next to #": lambda a, b: abs(a.x - b.x) > abs(a.y - b.y),
        "# beside #": lambda a, b: abs(a.x - b.x) > abs(a.y - b.y),
    }
    checked = Counter()
    for scene in SCENES:
        said, frame = mentions(caption(scene))
        for words, holds in geometry.items():
            if words in frame:
                pairs = [(a, b) for a in scene.things for b in scene.things if a is not b]
                assert any(fits(said[0], a) and fits(said[1], b) and holds(a, b) for a, b in pairs), caption(scene)
                checked[words] += 1
    assert set(checked) == set(geometry)


def test_a_caption_tells_the_background_as_it_is():
    for scene in SCENES:
        _, frame = mentions(caption(scene))
        ground = re.search(r"on a ([a-z ]+) (?:back)?ground|the background is ([a-z ]+)", frame)
        if ground:
            words = set((ground[1] or ground[2]).split())
            assert words <= {"dark" if scene.dark else "light", scene.background}


def test_captions_of_a_scene_vary():
    assert len({caption(SCENES[0], n) for n in range(20)}) > 10


def test_a_linear_classifier_on_pixels_cannot_tell_shapes():
    """Ridge regression on 16 x 16 x 3 pixels; chance is 1/8, with 200 pictures give or take 0.023."""
    scenes = [make_scene(0, Source.PAIRS, row, num_things=1) for row in range(1000)]
    pixels = np.stack([np.asarray(draw(scene).reduce(4), dtype=np.float64).ravel() / 255 for scene in scenes])
    pixels = np.hstack([pixels, np.ones((1000, 1))])
    labels = np.array([SHAPES.index(scene.things[0].shape) for scene in scenes])
    train, test = slice(0, 800), slice(800, 1000)
    gram = pixels[train].T @ pixels[train] + 10.0 * np.eye(pixels.shape[1])
    weights = np.linalg.solve(gram, pixels[train].T @ np.eye(8)[labels[train]])
    assert ((pixels[test] @ weights).argmax(axis=1) == labels[test]).mean() < 0.3
