"""The optimiser decays matrices and filters only; the learning rate is a function of the step."""

import doctest
from itertools import pairwise

import pytest

from dimefm.stages.models.image_student import build_student
from dimefm.stages.settings.distill import DistillSettings
from dimefm.stages.train import optim
from dimefm.stages.train.optim import build_optimizer, lr_at, set_lr


def names_by_decay(student):
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    optimizer = build_optimizer(student, DistillSettings(weight_decay=0.05))
    groups = {
        group["weight_decay"]: {names[id(parameter)] for parameter in group["params"]}
        for group in optimizer.param_groups
    }
    assert sum(map(len, groups.values())) == len(names)
    return groups[0.05], groups[0.0]


def test_norms_biases_positions_and_tokens_are_not_decayed():
    decayed, free = names_by_decay(build_student("timm:vit_tiny_patch16_224", embed_dim=20, image_size=32))
    assert {"trunk.pos_embed", "trunk.cls_token", "trunk.norm.weight", "trunk.blocks.0.attn.qkv.bias"} <= free
    assert {"trunk.patch_embed.proj.weight", "trunk.blocks.0.attn.qkv.weight", "trunk.head.weight"} <= decayed
    assert not any(name.endswith(".bias") for name in decayed)


def test_open_clips_own_towers_are_grouped_the_same_way():
    decayed, free = names_by_decay(build_student("open_clip:ViT-S-32", embed_dim=20, image_size=32))
    assert {"class_embedding", "positional_embedding", "ln_pre.weight"} <= free
    assert {"conv1.weight", "proj"} <= decayed


def test_frozen_parameters_are_left_to_themselves():
    student = build_student("timm:resnet10t", embed_dim=20, image_size=32)
    student.trunk.fc.weight.requires_grad_(False)
    groups = build_optimizer(student, DistillSettings()).param_groups
    assert not any(parameter is student.trunk.fc.weight for group in groups for parameter in group["params"])


def test_the_learning_rate_rises_linearly_and_falls_along_a_cosine_to_its_floor():
    rates = [lr_at(step, 100, 10, peak=1.0, floor=0.01) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == pytest.approx(1.0) and rates[99] == pytest.approx(0.01)
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))
    # Half-way between steps 10 and 99 the cosine is at the mean of both ends.
    assert (rates[54] + rates[55]) / 2 == pytest.approx((1.0 + 0.01) / 2)


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (2, 1), (5, 5)])
def test_runs_of_a_few_steps_have_a_learning_rate(total, warmup):
    assert all(0 < lr_at(step, total, warmup, peak=1.0, floor=0.01) <= 1 for step in range(total))


def test_the_worked_example_holds():
    assert doctest.testmod(optim).failed == 0 and doctest.testmod(optim).attempted > 0


def test_a_learning_rate_reaches_every_group():
    optimizer = build_optimizer(build_student("timm:resnet10t", embed_dim=20, image_size=32), DistillSettings())
    set_lr(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]
