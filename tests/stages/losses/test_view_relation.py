"""The relational loss over views: against a plain formula, over processes, and the views that it takes."""

import numpy as np
import pytest
import torch

from dimefm.cache.version.schema import Views
from dimefm.stages.images.crops import Crops
from dimefm.stages.losses.loss_inputs import LossInputs
from dimefm.stages.losses.view_relation import view_relation_loss, views_share
from dimefm.stages.sample.order import Draw
from dimefm.stages.sample.replay import Replay

from ...support.losses import embeddings


def plain(student, teacher, others, factor):
    """Twice the divergence of the student's softmax over the other views from the teacher's, row by row."""
    unit = [rows / rows.norm(dim=1, keepdim=True) for rows in (student, teacher, others)]
    p, q = (torch.softmax(factor * rows @ unit[2].T, dim=1) for rows in (unit[1], unit[0]))
    return 2 * (p * (p.log() - q.log())).sum(dim=1).mean()


def test_it_is_the_divergence_over_the_other_views_gradient_too():
    student, teacher, others = embeddings(6, 5).requires_grad_(), embeddings(6, 5, seed=1), embeddings(18, 5, seed=2)
    found, wanted = view_relation_loss(student, teacher, others, 3.0, 20.0), plain(student, teacher, others, 20.0 / 3)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_a_student_that_is_the_teacher_has_none_and_another_has_some():
    teacher, others = embeddings(6, 5, seed=1), embeddings(12, 5, seed=2)
    assert view_relation_loss(7 * teacher, teacher, others, 1.0, 10.0).item() == pytest.approx(0, abs=1e-12)
    assert view_relation_loss(embeddings(6, 5), teacher, others, 1.0, 10.0) > 0.1


def test_shares_of_the_processes_add_up_to_it():
    student, teacher, others = embeddings(8, 5), embeddings(8, 5, seed=1), embeddings(16, 5, seed=2)
    parts = [
        LossInputs(
            local_student=student[part],
            local_teacher=teacher[part],
            global_student=student,
            global_teacher=teacher,
            views=others,
        )
        for part in (slice(0, 3), slice(3, 8))
    ]
    total = sum(views_share(one, 4.0) for one in parts)
    torch.testing.assert_close(total, plain(student, teacher, others, 4.0), rtol=1e-12, atol=0)


def test_without_other_views_or_with_some_of_another_width_it_is_refused():
    student, teacher = embeddings(4, 5), embeddings(4, 5, seed=1)
    with pytest.raises(ValueError, match="no views in this step"):
        views_share(LossInputs.of_one_process(student, teacher), 1.0)
    with pytest.raises(ValueError, match="views: 3 wide, the teacher's embeddings are 5"):
        view_relation_loss(student, teacher, embeddings(8, 3))


def test_the_other_views_are_the_replayed_crops_that_an_image_is_not_seen_in():
    views = np.arange(6 * 5, dtype=np.float16).reshape(6, 5, 1)  # row r, view v: 5 r + v; view 0 is the centre
    replay = Replay(Crops.read(Views(count=4, crops={})), count=3, seed=0)
    draw = Draw(np.array([4, 0]), np.array([0, 0]), views=np.array([2, 3]))
    assert replay.others(draw, views)[:, 0].tolist() == [21, 23, 1, 2]
