"""Losses after CLIP-KD, and what TinyCLIP's comes to, against NumPy, torch's own functions and properties."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss

from dimefm.stages.losses.clip_kd import icl_loss, mse_loss
from dimefm.stages.losses.dime import feature_loss, pvl_loss, vl_loss
from dimefm.stages.losses.info_nce import info_nce_rows, masked_share
from dimefm.stages.losses.loss_inputs import LossInputs
from dimefm.stages.settings.distill import LossSettings, TemperatureSettings

from ...support.losses import embeddings, terms_of


def unit(matrix):
    matrix = matrix.double().numpy()
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def reference_icl(student, teacher, factor, bank=None, threshold=None):
    """Anchor by anchor, from the definition, in NumPy."""
    student, teacher = unit(student), unit(teacher)
    columns = teacher if bank is None else np.concatenate([teacher, unit(bank)])
    total = 0.0
    for i, anchor in enumerate(student):
        negatives = [j for j in range(len(columns)) if j != i]
        if threshold is not None:
            negatives = [j for j in negatives if teacher[i] @ columns[j] < threshold]
        logits = factor * np.array([anchor @ columns[j] for j in [i, *negatives]])
        total += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[0]
    return total / len(student)


def gradient(loss, student):
    leaf = student.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf), leaf)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_mse_is_the_mean_of_squares_between_unit_rows(dtype):
    student, teacher = embeddings(7, 12, dtype=dtype), embeddings(7, 12, seed=1, dtype=dtype)
    found = mse_loss(student, teacher)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rel = 1e-10 if dtype == torch.float64 else 2e-5
    assert found.item() == pytest.approx(np.square(unit(student) - unit(teacher)).mean(), rel=rel)
    assert found.item() == pytest.approx(
        F.mse_loss(F.normalize(student.double()), F.normalize(teacher.double())).item(), rel=rel
    )


def test_mse_is_the_feature_loss_at_2_over_the_width_its_weight_gradients_too():
    student, teacher = embeddings(7, 12), embeddings(7, 12, seed=1)
    assert mse_loss(student, teacher).item() == pytest.approx(2 / 12 * feature_loss(student, teacher).item(), rel=1e-10)
    wanted = 2 / 12 * gradient(lambda rows: feature_loss(rows, teacher), student)
    torch.testing.assert_close(gradient(lambda rows: mse_loss(rows, teacher), student), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threshold", [None, 0.1, -0.5])
@pytest.mark.parametrize("num_bank", [0, 19])
def test_icl_equals_the_reference_on_the_rounded_inputs(dtype, threshold, num_bank):
    student, teacher = embeddings(7, 12, dtype=dtype), embeddings(7, 12, seed=1, dtype=dtype)
    bank = embeddings(num_bank, 12, seed=2, dtype=dtype) if num_bank else None
    found = icl_loss(student, teacher, 3.0, 30.0, bank, threshold)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wanted = reference_icl(student, teacher, 30 / 3, bank, threshold)
    assert found.item() == pytest.approx(wanted, rel=1e-10 if dtype == torch.float64 else 2e-5)


def test_icl_is_cross_entropy_and_the_image_half_of_open_clips_loss():
    student, teacher = embeddings(7, 12), embeddings(7, 12, seed=1)
    logits, _ = ClipLoss().get_logits(F.normalize(student), F.normalize(teacher), 14.3)
    wanted = F.cross_entropy(logits, torch.arange(7))
    assert icl_loss(student, teacher, 1.0, 14.3).item() == pytest.approx(wanted.item(), rel=1e-10)


def test_icl_is_half_of_pvl_where_the_teacher_is_sure_of_each_image():
    # Teacher images at right angles: its softmax at scale 100 leaves e^-100 for the others, a one-hot target.
    student, teacher = embeddings(5, 8), torch.eye(8, dtype=torch.float64)[:5]
    assert icl_loss(student, teacher, 1.0, 100.0).item() == pytest.approx(
        pvl_loss(student, teacher, 1.0, 100.0).item() / 2, rel=1e-10
    )


def test_images_that_the_teacher_finds_alike_are_no_negatives_of_each_other():
    # By hand: 0 and 1 are one picture; each has image 2 alone against it, image 2 has both of them.
    teacher = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    wanted = (2 * np.log(1 + np.exp(-1)) + np.log(1 + 2 * np.exp(-1))) / 3
    assert icl_loss(student, teacher, 1.0, 1.0, threshold=0.9).item() == pytest.approx(wanted, rel=1e-12)
    wanted = (2 * np.log(2 + np.exp(-1)) + np.log(1 + 2 * np.exp(-1))) / 3
    assert icl_loss(student, teacher, 1.0, 1.0).item() == pytest.approx(wanted, rel=1e-12)
    assert masked_share(teacher, teacher, 0, 0.9).item() == pytest.approx(2 / 6)
    assert masked_share(teacher[1:], (teacher, teacher[2:]), 1, 0.9).item() == pytest.approx((1 + 1) / 6)


def test_with_no_negative_left_there_is_no_icl_loss():
    student, teacher = embeddings(4, 6), embeddings(4, 6, seed=1)
    assert icl_loss(student, teacher, threshold=-1.0).item() == 0
    assert (gradient(lambda rows: icl_loss(rows, teacher, threshold=-1.0), student) == 0).all()
    assert icl_loss(student[:1], teacher[:1]).item() == 0


@pytest.mark.parametrize("block", [(1, 1), (2, 3), (4, 26), (7, 5)])
@pytest.mark.parametrize("threshold", [None, 0.1])
def test_icl_in_blocks_is_icl_in_one_piece(block, threshold):
    student, teacher, others = embeddings(7, 12), embeddings(7, 12, seed=1), embeddings(16, 12, seed=2)
    columns = (others[:3], teacher, others[3:])

    def value_and_gradients(block):
        leaf, factor = student.clone().requires_grad_(), torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
        loss = info_nce_rows(leaf, teacher, columns, 3, factor, threshold, block)
        loss.backward()
        return torch.cat([loss.detach()[None], factor.grad[None], leaf.grad.flatten()])

    torch.testing.assert_close(value_and_gradients(block), value_and_gradients((7, 23)), rtol=1e-12, atol=1e-13)
    share = masked_share(teacher, columns, 3, 0.1, block)
    torch.testing.assert_close(share, masked_share(teacher, columns, 3, 0.1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("threshold", [None, 0.1])
def test_gradients_are_those_of_finite_differences_the_temperatures_too(threshold):
    teacher, bank = embeddings(4, 5, seed=1), embeddings(6, 5, seed=2)
    student = embeddings(4, 5, seed=3).requires_grad_()
    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: mse_loss(rows, teacher), student)
    assert torch.autograd.gradcheck(
        lambda rows, of: icl_loss(rows, teacher, of, 10.0, bank, threshold), (student, temperature)
    )


def test_no_gradient_reaches_a_target():
    student, teacher, bank = (embeddings(rows, 8, seed=seed).requires_grad_() for seed, rows in enumerate((5, 5, 9)))
    (mse_loss(student, teacher) + icl_loss(student, teacher, bank_images=bank, threshold=0.5)).backward()
    assert teacher.grad is None and bank.grad is None
    assert student.grad is not None and student.grad.abs().min() > 0


def test_a_second_derivative_is_refused():
    student = embeddings(4, 6).requires_grad_()
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(icl_loss(student, embeddings(4, 6, seed=1)), student, create_graph=True)


def test_autocast_and_coarse_products_change_no_bit():
    student, teacher, bank = (embeddings(64, 300, seed=seed, dtype=torch.float32) for seed in range(3))

    def value_and_gradient():
        leaf = student.clone().requires_grad_()
        loss = mse_loss(leaf, teacher) + icl_loss(leaf, teacher, bank_images=bank, threshold=0.1)
        loss.backward()
        return torch.cat([loss.detach()[None], leaf.grad.flatten()])

    plain, before = value_and_gradient(), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert (value_and_gradient() == plain).all()
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_student_that_is_nearly_right_loses_no_digits_and_a_wrong_one_overflows_nothing():
    teacher = torch.eye(6)
    # By hand: five negatives at e^-20 each.
    assert icl_loss(teacher, teacher, 1.0, 20.0).item() == pytest.approx(5 * np.exp(-20), rel=1e-5)
    # By hand: its own image at -1e5, five others at 0.
    assert icl_loss(-teacher, teacher, 0.01, 1000.0).item() == pytest.approx(1e5 + np.log(5), rel=1e-6)


@pytest.mark.parametrize("cuts", [[0, 8], [0, 4, 8], [0, 2, 4, 6, 8], [0, 1, 3, 6, 8]])
@pytest.mark.parametrize("pieces", [False, True])
def test_shares_of_the_processes_add_up_to_the_losses_and_gradients_of_the_global_batch(cuts, pieces, monkeypatch):
    if pieces:
        monkeypatch.setattr("dimefm.stages.losses.similarity_blocks._WHOLE", 1)
        monkeypatch.setattr("dimefm.stages.losses.similarity_blocks._CPU_BLOCK", 60)
    teacher, bank = embeddings(8, 6, seed=1), embeddings(10, 6, seed=3)
    weights, temperature = LossSettings(mse=1.0, icl=1.0, icl_threshold=0.3), TemperatureSettings(icl=2.0)
    student = embeddings(8, 6).requires_grad_()
    summed = {}
    for start, stop in itertools.pairwise(cuts):
        inputs = LossInputs(
            local_student=student[start:stop],
            local_teacher=teacher[start:stop],
            global_student=student,
            global_teacher=teacher,
            bank=bank,
            first_row=start,
        )
        for name, term in terms_of(inputs, weights, temperature, 10.0).items():
            summed[name] = summed.get(name, 0) + term
    wanted = {
        "mse": lambda rows: mse_loss(rows, teacher),
        "icl": lambda rows: icl_loss(rows, teacher, 2.0, 10.0, bank, 0.3),
    }
    assert set(summed) == set(wanted)
    for name, loss in wanted.items():
        torch.testing.assert_close(summed[name], loss(student), rtol=1e-12, atol=0)
        (found,) = torch.autograd.grad(summed[name], student, retain_graph=True)
        torch.testing.assert_close(found, gradient(loss, student.detach()), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("first", [None, -1, 3])
def test_icl_of_several_processes_wants_to_know_which_images_are_its_own(first):
    student, teacher = embeddings(4, 6), embeddings(4, 6, seed=1)
    inputs = LossInputs(
        local_student=student[:2],
        local_teacher=teacher[:2],
        global_student=student,
        global_teacher=teacher,
        first_row=first,
    )
    with pytest.raises(ValueError, match="place of these 2 rows among the 4"):
        terms_of(inputs, LossSettings(icl=1.0), TemperatureSettings(), 10.0)


def test_shapes_and_numbers_that_do_not_fit_are_refused():
    for loss in (mse_loss, icl_loss):
        with pytest.raises(ValueError, match="3 rows of the student's against 2"):
            loss(torch.ones(3, 4), torch.ones(2, 4))
        with pytest.raises(ValueError, match="3 wide, the teacher's 8"):
            loss(torch.ones(5, 3), torch.ones(5, 8))
    with pytest.raises(ValueError, match="bank: 5 wide"):
        icl_loss(torch.ones(2, 4), torch.ones(2, 4), bank_images=torch.ones(3, 5))
    with pytest.raises(ValueError, match="above 0"):
        icl_loss(torch.ones(2, 4), torch.ones(2, 4), temperature=0.0)


def test_tinyclips_affinity_mimicking_is_half_of_vl_and_a_number_that_only_the_teacher_changes():
    # A_I2T and A_T2I are softmaxes of the similarities; the loss is the mean of their two cross-entropies to the
    # teacher's, written here as its code does. Images and sentences need not be as many.
    student, teacher, sentences = embeddings(7, 12), embeddings(7, 12, seed=1), embeddings(19, 12, seed=2)

    def affinity(rows):
        logits = 10 * F.normalize(rows) @ F.normalize(sentences).T
        targets = 10 * F.normalize(teacher) @ F.normalize(sentences).T
        over_sentences = F.cross_entropy(logits, targets.softmax(1))
        return (over_sentences + F.cross_entropy(logits.T, targets.T.softmax(1))) / 2

    def half_of_vl(rows):
        return vl_loss(rows, teacher, sentences, 1.0, 10.0) / 2

    torch.testing.assert_close(gradient(affinity, student), gradient(half_of_vl, student), rtol=1e-10, atol=1e-13)
    entropy = affinity(teacher)  # cross-entropy of the teacher with itself
    for rows in (student, embeddings(7, 12, seed=5)):
        torch.testing.assert_close(affinity(rows), half_of_vl(rows) + entropy, rtol=1e-10, atol=0)
