"""Weights that make up for retrieved sentences: exact in blocks and processes, nearer to the corpus than without."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dimefm.stages.losses.diagnostics import effective_candidates
from dimefm.stages.losses.dime import vl_loss
from dimefm.stages.losses.loss_inputs import LossInputs, SamplingWeights
from dimefm.stages.losses.similarity_blocks import LogWeights
from dimefm.stages.losses.wide_kl import kl_both_ways, kl_rows
from dimefm.stages.sample.inclusion import inclusion
from dimefm.stages.sample.order import Share, Stream
from dimefm.stages.sample.retrieved import PairStream
from dimefm.stages.settings.distill import LossSettings, PairSampling, TemperatureSettings

from ...support.losses import embeddings, terms_of
from ...support.small_cache import make_cache
from ...support.small_pairs import add_pairs, unit

FACTOR = 6.0


def weights(num_images, num_sentences, k=3, seed=9):
    """Log weights of sentences; for each image k distinct places (the last one nowhere) and values."""
    random = np.random.default_rng(seed)
    places = np.array([random.choice(num_sentences, k, replace=False) for _ in range(num_images)])
    places[:, -1] = -1
    values = torch.from_numpy(random.normal(size=(num_images, k)))
    return torch.from_numpy(random.normal(size=num_sentences)), torch.from_numpy(places), values


def plain(student, teacher, sentences, columns, places=None, values=None):
    """Both halves of vl from whole matrices: weights added cell by cell, rows of sentences averaged by their own."""
    extra = columns.repeat(len(student), 1)
    for i, j in itertools.product(range(len(student)), range(0 if places is None else places.shape[1])):
        if places[i, j] >= 0:
            extra[i, places[i, j]] += values[i, j]
    student, teacher, sentences = (F.normalize(rows, dim=1) for rows in (student, teacher, sentences))
    halves = []
    for axis in (1, 0):
        log_p = F.log_softmax(FACTOR * teacher @ sentences.T + extra, dim=axis)
        log_q = F.log_softmax(FACTOR * student @ sentences.T + extra, dim=axis)
        halves.append((log_p.exp() * (log_p - log_q)).sum(axis))
    return halves[0].mean() + (halves[1] * columns.exp()).sum() / columns.exp().sum()


def with_gradient(loss, student):
    student = student.clone().requires_grad_()
    value = loss(student)
    value.backward()
    return value.detach(), student.grad


def agree(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_the_weighted_loss_and_its_gradient_are_the_plain_formula():
    student, teacher, sentences = embeddings(7, 5), embeddings(7, 5, seed=1), embeddings(11, 5, seed=2)
    columns, places, values = weights(7, 11)
    for own in (None, (places, values)):

        def ours(rows, own=own):
            return vl_loss(rows, teacher, sentences, 2.0, 2 * FACTOR, columns, own)

        def theirs(rows, own=own):
            return plain(rows, teacher, sentences, columns, *(own or ()))

        agree(with_gradient(ours, student), with_gradient(theirs, student))


@pytest.mark.parametrize("block", [(7, 11), (2, 11), (7, 3), (3, 4), (1, 1)])
def test_blocks_of_any_shape_give_the_same(block):
    student, teacher, sentences = embeddings(7, 5), embeddings(7, 5, seed=1), embeddings(11, 5, seed=2)
    columns, places, values = weights(7, 11)
    of_sentences = columns.softmax(0)

    def both(rows):
        log = LogWeights(columns, places, values)
        return kl_both_ways(teacher, rows, sentences, sentences, FACTOR, 1 / 7, of_sentences, block, log_weights=log)

    def apart(rows):
        log, turned = LogWeights(columns, places, values), LogWeights(None, places, values, along=0)
        over_sentences = kl_rows(teacher, rows, sentences, sentences, FACTOR, block, log_weights=log)
        over_images = kl_rows(
            *(sentences, sentences, teacher, rows, FACTOR, block[::-1]), log_weights=turned, row_weights=of_sentences
        )
        return over_sentences / 7 + over_images

    wanted = with_gradient(lambda rows: plain(rows, teacher, sentences, columns, places, values), student)
    agree(with_gradient(both, student), wanted)
    agree(with_gradient(apart, student), wanted)


def test_weights_of_zero_change_nothing_and_a_constant_neither():
    student, teacher, sentences = embeddings(7, 5), embeddings(7, 5, seed=1), embeddings(11, 5, seed=2)
    _, places, values = weights(7, 11)
    without = with_gradient(lambda rows: vl_loss(rows, teacher, sentences, 1.0, FACTOR), student)
    for constant in (0.0, 3.0):
        same = torch.full((11,), constant, dtype=torch.float64)

        def ours(rows, same=same):
            return vl_loss(rows, teacher, sentences, 1.0, FACTOR, same, (places, 0 * values))

        for one, other in zip(with_gradient(ours, student), without, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-15)


def test_shares_of_processes_add_up_to_the_weighted_loss():
    student, teacher, sentences = embeddings(6, 5), embeddings(6, 5, seed=1), embeddings(10, 5, seed=2)
    columns, places, values = weights(6, 10)
    everybodys = SamplingWeights(columns, places, values)

    def shares(rows):
        total = torch.zeros((), dtype=torch.float64)
        for rank in (0, 1):
            images, own = slice(3 * rank, 3 * rank + 3), slice(5 * rank, 5 * rank + 5)
            inputs = LossInputs(
                local_student=rows[images],
                local_teacher=teacher[images],
                global_student=rows,
                global_teacher=teacher,
                local_others=sentences[own],
                global_others=sentences,
                local_sampling=SamplingWeights(columns[own], places[images], values[images]),
                global_sampling=everybodys,
                first_other=5 * rank,
            )
            total = total + terms_of(inputs, LossSettings(vl=1.0), TemperatureSettings(), FACTOR)["vl"]
        return total

    wanted = with_gradient(lambda rows: plain(rows, teacher, sentences, columns, places, values), student)
    agree(with_gradient(shares, student), wanted)


def test_effective_candidates_count_by_the_weighted_softmax():
    rows, sentences = embeddings(7, 5), embeddings(11, 5, seed=2)
    columns, _, _ = weights(7, 11)
    p = (FACTOR * F.normalize(rows, dim=1) @ F.normalize(sentences, dim=1).T + columns).softmax(1)
    wanted = (-(p * p.log()).sum(1)).exp().mean()
    torch.testing.assert_close(effective_candidates(rows, sentences, 1.0, FACTOR, LogWeights(columns)), wanted)


@pytest.mark.parametrize(
    ("columns", "own", "said"),
    [
        (torch.zeros(10), None, "sentence_log_weights: "),
        (torch.zeros(11, dtype=torch.int64), None, "sentence_log_weights: "),
        (None, (torch.zeros(7, 2, dtype=torch.int64), torch.zeros(7, 3)), "own_log_weights: wanted places and values"),
        (None, (torch.zeros(6, 2, dtype=torch.int64), torch.zeros(6, 2)), "for 7 images"),
    ],
)
def test_weights_that_do_not_fit_are_refused(columns, own, said):
    with pytest.raises(ValueError, match=said):
        vl_loss(embeddings(7, 5), embeddings(7, 5), embeddings(11, 5), 1.0, 1.0, columns, own)


def all_orders(rates, count):
    """P(a candidate is among `count` drawn one after the other), by going through all orders."""
    found = np.zeros(len(rates))
    for order in itertools.permutations(range(len(rates)), count):
        chance = 1.0
        for place, i in enumerate(order):
            chance *= rates[i] / rates[[j for j in range(len(rates)) if j not in order[:place]]].sum()
        found[list(order)] += chance
    return found


@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_chances_of_a_draw_without_replacement_are_those_of_all_orders(spread, count):
    logits = spread * np.random.default_rng(count).normal(size=(5, 6)) + 50
    logits[1, 2] = logits[3, :4] = -np.inf
    found = inclusion(logits, count)
    for row, one in zip(found, logits, strict=True):
        there = np.isfinite(one)
        wanted = all_orders(np.exp(one[there] - 50), min(count, int(there.sum())))
        assert row[there] == pytest.approx(wanted, abs=2e-7) and not row[~there].any()


def corpus(folder):
    """24 images, of which one failed, 60 sentences, 4 candidates of each image; and a logit scale."""
    return add_pairs(make_cache(folder, num_images=24, num_sentences=60), k=4), 6.0


def drawn(cache, scale, batch, num_sentences, per_image, correct=True):
    images = Stream(cache.images.usable, batch, 0, "images")
    random = Stream(cache.sentences.usable, num_sentences, 0, "sentences")
    settings = PairSampling(per_image=per_image, correct=correct)
    return images, PairStream(cache, images, random, settings, 0, scale)


@pytest.mark.parametrize(("batch", "num_sentences", "per_image"), [(4, 20, 3), (8, 30, 2)])
def test_steps_hold_sentences_and_cells_as_often_as_the_rates_say(tmp_path, batch, num_sentences, per_image):
    cache, scale = corpus(tmp_path)
    images, pairs = drawn(cache, scale, batch, num_sentences, per_image)
    steps = 1000
    held, together, there = np.zeros(60), np.zeros((24, 60)), np.zeros(24)
    for step in range(steps):
        rows, sentences = images.draw(step).rows, pairs.draw(step).rows
        held[sentences] += 1
        there[rows] += 1
        together[np.ix_(rows, sentences)] += 1
    assert pairs.rates is not None
    assert pairs.rates.held(np.arange(60)).sum() == pytest.approx(num_sentences, rel=1e-4)
    # Images come in passes, not independently, and the number that is retrieved varies: a few percent beside chance.
    assert held / steps == pytest.approx(pairs.rates.held(np.arange(60)), rel=0.03, abs=0.07)
    ids, _, logits = pairs.candidates(cache.images.usable)
    own = pairs.rates.own_log_weights(ids, logits)
    wanted = pairs.rates.held(ids) / np.exp(own)
    found = np.take_along_axis(together[cache.images.usable], ids, 1) / there[cache.images.usable, None]
    assert np.abs(found - wanted).mean() < 0.04


def test_with_correction_softmaxes_and_gradients_are_nearer_to_those_of_the_whole_corpus(tmp_path):
    cache, scale = corpus(tmp_path)
    images, pairs = drawn(cache, scale, 4, 20, 2)
    u, v = unit(cache.images.embeddings[:]), unit(cache.sentences.embeddings[:])
    logits = torch.from_numpy(np.nan_to_num(scale * u @ v.T))
    wanted = logits.softmax(1)
    found = {name: torch.zeros_like(logits) for name in ("plain", "columns", "cells")}
    times = torch.zeros(24, 1)
    teachers, sentences = torch.from_numpy(np.nan_to_num(u)), torch.from_numpy(v)
    student = teachers + 0.3 * embeddings(24, 16)
    gradients = {name: torch.zeros_like(student) for name in found}
    for step in range(1200):
        rows, draw = torch.from_numpy(images.draw(step).rows), pairs.draw(step)
        of, here = torch.from_numpy(draw.rows), draw.weights
        assert here is not None
        columns, places, values = (torch.from_numpy(part) for part in (here.sentences, here.places, here.values))
        times[rows] += 1
        for name, log in {
            "plain": None,
            "columns": LogWeights(columns.double()),
            "cells": LogWeights(columns, places, values),
        }.items():
            block = logits[rows][:, of].clone()
            if log is not None:
                log.add_to(block, range(len(rows)), range(len(of)))
            found[name][rows[:, None], of] += block.softmax(1)
            if step < 400:
                part = student[rows].requires_grad_()
                sides = teachers[rows], part, sentences[of], sentences[of]
                kl_rows(*sides, scale, log_weights=log).backward()
                gradients[name][rows] += part.grad
    whole = student.clone().requires_grad_()
    kl_rows(teachers, whole, sentences, sentences, scale).backward()
    passes = torch.bincount(torch.cat([torch.from_numpy(images.draw(step).rows) for step in range(400)]), minlength=24)
    usable = torch.from_numpy(cache.images.usable)
    far = {name: 0.5 * (found[name] / times - wanted)[usable].abs().sum(1).mean() for name in found}
    off = {
        name: ((gradients[name] / passes[:, None] - whole.grad)[usable]).norm() / whole.grad[usable].norm()
        for name in found
    }
    # Found: distances 0.172, 0.108, 0.037; gradients off by 0.232, 0.190, 0.117, with the noise of 400 steps.
    assert far["columns"] < 0.75 * far["plain"] and far["cells"] < 0.4 * far["plain"]
    assert off["columns"] < 0.95 * off["plain"] and off["cells"] < 0.65 * off["plain"]


def test_parts_of_the_weights_are_those_of_their_sentences_and_images(tmp_path):
    cache, scale = corpus(tmp_path)
    _, pairs = drawn(cache, scale, 4, 20, 2)
    whole = pairs.draw(3).weights
    parts = [Share(pairs, rank, 4).draw(3).weights for rank in range(4)]
    for name in ("sentences", "places", "values"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
    ids, _, _ = pairs.candidates(pairs._images.draw(3).rows)
    rows = pairs.draw(3).rows
    assert (np.where(whole.places >= 0, rows[whole.places], ids) == ids).all()
    assert np.isin(ids[whole.places < 0], rows).sum() == 0
