"""One step of one student: pieces, averages and clipping against what they should come to, by hand."""

import pytest
import timm
import torch
from torch import nn

from dimefm.stages.losses.clip_kd import icl_loss
from dimefm.stages.settings.distill import DistillSettings, LossSettings, TemperatureSettings
from dimefm.stages.settings.models import StudentSettings
from dimefm.stages.train.processes import World
from dimefm.stages.train.student import Student, share_batch_statistics
from dimefm.stages.train.targets import Targets
from dimefm.stages.train.tower import LearnedScale

WORLD = World(torch.device("cpu"))
LOSS = LossSettings(vl=0.7, pvl=0.3, udist=0.2, feature=1.0)


def make_student(world, model="plain", **settings):
    chosen = StudentSettings(model=f"own_students:{model}", image_size=8)
    return Student(chosen, DistillSettings(**{"loss": LOSS, **settings}), 16, WORLD, "fp32", 20.0, fresh=True)


def some_targets(num_images=12, num_sentences=20):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(num_images + num_sentences, 16, generator=generator).half()
    images = torch.randn(num_images, 3, 8, 8, generator=generator)
    return images, Targets.gather(rows[:num_images], rows[num_images:], None, WORLD)


def gradients(student, images, targets):
    student.image.add_gradients(images, targets)
    return [parameter.grad for parameter in student.image.model.parameters()]


@pytest.mark.parametrize("pieces", [2, 5, 12])
def test_gradients_of_a_batch_in_pieces_are_those_of_the_whole_batch(world, pieces):
    images, targets = some_targets()
    whole = gradients(make_student(world), images, targets)
    in_pieces = gradients(make_student(world, accumulate=pieces), images, targets)
    for wanted, found in zip(whole, in_pieces, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_gradients_summed_over_pieces_that_know_nothing_of_each_other_are_others(world):
    """What plain accumulation would do to losses that compare images with each other."""
    images, targets = some_targets()
    whole = gradients(make_student(world), images, targets)
    alone = make_student(world)
    for start in (0, 6):
        part = Targets.gather(targets.inputs.local_teacher[start : start + 6], targets.inputs.local_others, None, WORLD)
        alone.image.add_gradients(images[start : start + 6], part)
    apart = [parameter.grad / 2 for parameter in alone.image.model.parameters()]
    assert not torch.allclose(apart[-1], whole[-1], rtol=0.05)


def test_pieces_draw_the_same_dropout_when_they_are_embedded_again(world):
    images, targets = some_targets()
    student = make_student(world, "with_dropout", accumulate=3)
    seen = []
    student.image.model[4].register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))
    student.learn(images, targets, 0.0)
    assert len(seen) == 6 and all(torch.equal(*pair) for pair in zip(seen[:3], seen[3:]))
    assert not torch.equal(seen[0] == 0, seen[1] == 0)


def test_batch_norms_count_every_piece_once(world):
    images, targets = some_targets()
    student = make_student(world, "with_dropout", accumulate=3)
    student.learn(images, targets, 0.0)
    assert int(student.image.model[1].num_batches_tracked) == 3
    assert any("statistics are those of 3 parts" in note for note in student.notes())


def test_the_average_follows_the_weights_by_its_decay(world):
    images, targets = some_targets()
    student = make_student(world, ema=0.5)
    expected = None
    for step in range(1, 5):
        student.learn(images, targets, 0.01)
        now = student.image.model[0].weight.detach().clone()
        decay = 0.0 if step == 1 else min(0.5, 1 - step ** -(2 / 3))  # timm: the average of few steps is short
        expected = now if expected is None else decay * expected + (1 - decay) * now
    torch.testing.assert_close(student.image.averaged.module[0].weight, expected)


def test_a_gradient_that_is_too_long_is_scaled_to_the_limit(world):
    images, targets = some_targets()
    student = make_student(world, clip_grad_norm=0.25)
    student.learn(images, targets, 0.0)
    clipped = torch.stack([p.grad.norm() for p in student.image.model.parameters()]).norm()
    assert student.image.gradient_norm > 0.25 and clipped == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_learned_scale_takes_the_step_that_its_gradient_asks_for(world, pieces):
    images, targets = some_targets()
    loss = LossSettings(feature=1.0, icl=0.3, icl_threshold=0.5)
    temperature = TemperatureSettings(icl=2.0, icl_learned=True)
    student = make_student(world, loss=loss, temperature=temperature, accumulate=pieces, weight_decay=0.5)
    log = torch.tensor(10.0).log().requires_grad_()  # the student's logit scale is 20
    optimizer = torch.optim.AdamW([log], weight_decay=0.0)
    for lr in (0.01, 0.2):
        student.learn(images, targets, lr)
        assert student.image.factors["icl"] == pytest.approx(log.exp().item(), rel=1e-5)
        optimizer.zero_grad()
        (
            0.3 * icl_loss(student.image.embeddings, targets.inputs.local_teacher, 1 / log.exp(), 1.0, threshold=0.5)
        ).backward()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        assert student.image.scales["icl"].log.item() == pytest.approx(log.item(), rel=1e-5)
    assert not any("log" in name for name in student.image.model.state_dict())


@pytest.mark.parametrize(("start", "largest"), [(20.0, 100.0), (250.0, 250.0)])
def test_a_learned_scale_stays_within_clips_bound_or_where_it_began(start, largest):
    scale = LearnedScale(start, WORLD.device)
    scale.clamp()
    assert scale().item() == pytest.approx(start, rel=1e-6)
    with torch.no_grad():
        scale.log.add_(10.0)
    scale.clamp()
    assert scale().item() == pytest.approx(largest, rel=1e-6)


def test_nothing_is_learned_of_a_loss_that_is_off(world):
    student = make_student(world, temperature=TemperatureSettings(icl_learned=True))
    student.learn(*some_targets(), 0.01)
    assert not student.image.factors and len(student.image._optimizer.param_groups) == 2


def test_a_step_leaves_the_process_own_random_numbers_to_the_student(world):
    """Whatever else draws, a student's dropout is its own."""
    images, targets = some_targets()
    outputs = []
    for disturb in (0, 7):
        student = make_student(world, "with_dropout")
        torch.rand(disturb)
        student.learn(images, targets, 0.0)
        outputs.append(student.image.embeddings)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "efficientnet_b0", "levit_128s", "resnet10t"])
def test_norms_that_hold_an_activation_keep_it_when_processes_share_their_statistics(name):
    """torch's own conversion drops it: a student would learn as another function than it is scored as."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=8).eval()
    images = torch.randn(2, 3, 224 if "levit" in name else 64, 224 if "levit" in name else 64)
    with torch.no_grad():
        before = model(images)
        shared = share_batch_statistics(model)
        assert torch.equal(shared(images), before)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in shared.modules())


@pytest.mark.acceptance
def test_a_compiled_student_learns_what_a_plain_one_does(world):
    images, targets = some_targets()
    plain, compiled = make_student(world), make_student(world, compile=True)
    for student in (plain, compiled):
        for _ in range(3):
            student.learn(images, targets, 1e-3)
    assert compiled.image.model.state_dict().keys() == plain.image.model.state_dict().keys()
    for wanted, found in zip(plain.image.model.parameters(), compiled.image.model.parameters()):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    assert isinstance(compiled.image.model, nn.Module)
