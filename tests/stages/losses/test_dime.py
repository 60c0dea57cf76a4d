"""The losses against the numbers of the specification, an independent NumPy reference, and properties of the paper."""

import itertools
import json

import numpy as np
import pytest
import torch

from dimefm.stages.losses.diagnostics import effective_candidates
from dimefm.stages.losses.dime import feature_loss, pvl_loss, udist_loss, vl_loss
from dimefm.stages.losses.loss_inputs import LossInputs
from dimefm.stages.settings.distill import LossSettings, TemperatureSettings

from ...support.losses import embeddings, terms_of
from ...support.paths import DATA

# Made with another implementation, checked against the authors' code; see "about" in the file.
VECTORS = json.loads((DATA / "loss_vectors.json").read_text())["cases"]


def reference_kl(p_logits, q_logits):
    """Row by row, from the definition."""
    total = 0.0
    for p_row, q_row in zip(p_logits, q_logits):
        p, q = np.exp(p_row - p_row.max()), np.exp(q_row - q_row.max())
        p, q = p / p.sum(), q / q.sum()
        total += float(np.sum(p * np.log(p / q)))
    return total / len(p_logits)


def reference(student, teacher, sentences, scale, temperature):
    """The three losses in NumPy, float64."""
    student, teacher, sentences = (
        matrix.double().numpy() / np.linalg.norm(matrix.double().numpy(), axis=1, keepdims=True)
        for matrix in (student, teacher, sentences)
    )

    def kl(p, q, of):
        return reference_kl(scale * p / of, scale * q / of)

    return {
        "vl": kl(teacher @ sentences.T, student @ sentences.T, temperature["vl"])
        + kl(sentences @ teacher.T, sentences @ student.T, temperature["vl"]),
        "pvl": 2 * kl(teacher @ teacher.T, student @ teacher.T, temperature["pvl"]),
        "udist": 2 * kl(teacher @ teacher.T, student @ student.T, temperature["udist"]),
    }


def ours(student, teacher, sentences, scale, temperature):
    return {
        "vl": vl_loss(student, teacher, sentences, temperature["vl"], scale),
        "pvl": pvl_loss(student, teacher, temperature["pvl"], scale),
        "udist": udist_loss(student, teacher, temperature["udist"], scale),
    }


@pytest.mark.parametrize("name", VECTORS)
def test_the_specifications_numbers_come_out_in_float64(name):
    case = VECTORS[name]
    student, teacher, sentences = (
        torch.tensor(case[key], dtype=torch.float64)
        for key in ("student_images", "teacher_images", "teacher_sentences")
    )
    student.requires_grad_()
    found = ours(student, teacher, sentences, case["logit_scale"], case["temperature"])
    for key in ("vl", "pvl", "udist"):
        assert found[key].item() == pytest.approx(case["expected"][key], rel=1e-10)
    total = 0.7 * found["vl"] + 0.3 * found["pvl"]
    assert total.item() == pytest.approx(case["expected"]["total_0.7_0.3_0"], rel=1e-10)
    if "gradient_of_total_wrt_student_images" in case:
        total.backward()
        wanted = torch.tensor(case["gradient_of_total_wrt_student_images"]["value"], dtype=torch.float64)
        torch.testing.assert_close(student.grad, wanted, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", VECTORS)
def test_the_specifications_numbers_come_out_in_float32(name):
    case = VECTORS[name]
    matrices = [torch.tensor(case[key]) for key in ("student_images", "teacher_images", "teacher_sentences")]
    found = ours(*matrices, case["logit_scale"], case["temperature"])
    for key in ("vl", "pvl", "udist"):
        assert found[key].item() == pytest.approx(case["expected"][key], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_losses_equal_the_reference_on_the_rounded_inputs(dtype, seed):
    matrices = [embeddings(rows, 12, seed=10 * seed + rows, dtype=dtype) for rows in (7, 7, 19)]
    matrices[1] = matrices[1] + 3  # a narrow cone, like a real teacher's
    temperature = {"vl": 1.0, "pvl": 3.0, "udist": 7.0}
    wanted = reference(*matrices, 30.0, temperature)
    for key, value in ours(*matrices, 30.0, temperature).items():
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert value.item() == pytest.approx(wanted[key], rel=1e-10 if dtype == torch.float64 else 2e-5)


def test_one_float64_input_makes_float64():
    student, teacher = embeddings(4, 6), embeddings(4, 6, seed=1, dtype=torch.float16)
    assert pvl_loss(student, teacher).dtype == torch.float64


def test_a_student_that_matches_has_no_loss():
    teacher, sentences = embeddings(6, 8), embeddings(9, 8, seed=1)
    student = 3 * teacher  # norms do not count
    assert vl_loss(student, teacher, sentences).item() == pytest.approx(0, abs=1e-12)
    assert pvl_loss(student, teacher).item() == pytest.approx(0, abs=1e-12)
    assert udist_loss(student, teacher).item() == pytest.approx(0, abs=1e-12)
    assert feature_loss(student, teacher).item() == pytest.approx(0, abs=1e-12)


def test_udist_is_0_for_a_rotated_student_and_the_others_are_not():
    teacher, sentences = embeddings(6, 8), embeddings(9, 8, seed=1)
    rotation = torch.linalg.qr(embeddings(8, 8, seed=2)).Q
    student = teacher @ rotation
    assert udist_loss(student, teacher).item() == pytest.approx(0, abs=1e-12)
    assert min(vl_loss(student, teacher, sentences), pvl_loss(student, teacher), feature_loss(student, teacher)) > 0.1


def test_udist_alone_takes_a_student_of_another_width():
    assert udist_loss(embeddings(5, 3), embeddings(5, 8, seed=1)).isfinite()
    for loss in (pvl_loss, feature_loss):
        with pytest.raises(ValueError, match="3 wide, the teacher's 8"):
            loss(embeddings(5, 3), embeddings(5, 8, seed=1))


def test_feature_loss_is_1_minus_cosine_by_hand():
    student, teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, -1.0]])
    assert feature_loss(student, teacher).item() == pytest.approx((0 + 2) / 2)


def test_no_gradient_reaches_a_target():
    student, teacher, sentences = (embeddings(rows, 8, seed=rows).requires_grad_() for rows in (5, 5, 9))
    teacher = embeddings(5, 8, seed=1).requires_grad_()
    total = vl_loss(student, teacher, sentences) + pvl_loss(student, teacher)
    (total + udist_loss(student, teacher) + feature_loss(student, teacher)).backward()
    assert teacher.grad is None and sentences.grad is None
    assert student.grad is not None and student.grad.abs().min() > 0


@pytest.mark.parametrize("name", ["vl", "pvl", "udist", "feature"])
def test_gradients_are_those_of_finite_differences(name):
    teacher, sentences = embeddings(4, 5, seed=1), embeddings(6, 5, seed=2)
    losses = {
        "vl": lambda student: vl_loss(student, teacher, sentences, 2.0, 10.0),
        "pvl": lambda student: pvl_loss(student, teacher, 3.0, 10.0),
        "udist": lambda student: udist_loss(student, teacher, 7.0, 10.0),
        "feature": lambda student: feature_loss(student, teacher),
    }
    assert torch.autograd.gradcheck(losses[name], embeddings(4, 5, seed=3).requires_grad_())


def test_autocast_and_coarse_products_change_no_bit():
    # 300 wide so that the coarse kernels are really chosen; on the CPU "medium" may round products to bf16.
    student, teacher, sentences = (embeddings(64, 300, seed=seed, dtype=torch.float32) for seed in range(3))

    def value_and_gradient():
        leaf = student.clone().requires_grad_()
        loss = vl_loss(leaf, teacher, sentences) + pvl_loss(leaf, teacher) + udist_loss(leaf, teacher)
        loss.backward()
        return torch.cat([loss.detach()[None], leaf.grad.flatten()])

    plain, before = value_and_gradient(), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert (value_and_gradient() == plain).all()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_sharp_teacher_overflows_nothing():
    teacher = torch.eye(3)
    loss = pvl_loss(-teacher, teacher, temperature=0.01, logit_scale=1000.0)
    # By hand: the teacher is sure of its own image, for which the student has -1e5 against 0: 1e5 nats a row, twice.
    assert loss.item() == pytest.approx(2e5, rel=1e-4)


def test_terms_that_are_off_are_absent_and_each_has_its_own_temperature():
    student, teacher = embeddings(4, 6), embeddings(4, 6, seed=1)
    temperature = TemperatureSettings(pvl=2.0, udist=5.0)
    inputs = LossInputs.of_one_process(student, teacher)
    terms = terms_of(inputs, LossSettings(pvl=0.1, udist=2.0), temperature, 10.0)
    assert set(terms) == {"pvl", "udist"}
    assert terms["pvl"] == pvl_loss(student, teacher, 2.0, 10.0)
    assert terms["udist"] == udist_loss(student, teacher, 5.0, 10.0)


def test_a_bank_stands_beside_the_batch_on_both_sides():
    student, teacher, bank = embeddings(4, 6), embeddings(4, 6, seed=1), embeddings(9, 6, seed=2)
    units = [
        matrix.numpy() / np.linalg.norm(matrix.numpy(), axis=1, keepdims=True) for matrix in (student, teacher, bank)
    ]
    columns = np.concatenate(units[1:])
    wanted = 2 * reference_kl(10 * units[1] @ columns.T / 3, 10 * units[0] @ columns.T / 3)
    assert pvl_loss(student, teacher, 3.0, 10.0, bank_images=bank).item() == pytest.approx(wanted, rel=1e-10)
    with pytest.raises(ValueError, match="bank: 5 wide, the teacher's embeddings are 6"):
        pvl_loss(student, teacher, bank_images=embeddings(9, 5))


@pytest.mark.parametrize("cuts", [([0, 4, 8], [0, 6, 12]), ([0, 1, 3, 6, 8], [0, 5, 6, 10, 12])])
@pytest.mark.parametrize("pieces", [False, True])
def test_shares_of_the_processes_add_up_to_the_losses_and_gradients_of_the_global_batch(cuts, pieces, monkeypatch):
    if pieces:
        monkeypatch.setattr("dimefm.stages.losses.similarity_blocks._WHOLE", 1)
        monkeypatch.setattr("dimefm.stages.losses.similarity_blocks._CPU_BLOCK", 60)
    teacher, sentences, bank = embeddings(8, 6, seed=1), embeddings(12, 6, seed=2), embeddings(10, 6, seed=3)
    weights = LossSettings(vl=1.0, pvl=1.0, udist=1.0, feature=1.0)
    temperature = TemperatureSettings()

    def terms_and_gradients(student, all_inputs):
        """Each loss, summed over the processes, and the gradient that arrives at the student's global embeddings."""
        summed = {}
        for inputs in all_inputs:
            for name, term in terms_of(inputs, weights, temperature, 10.0).items():
                summed[name] = summed.get(name, 0) + term
        return {
            name: (term.detach(), torch.autograd.grad(term, student, retain_graph=True)[0])
            for name, term in summed.items()
        }

    student = embeddings(8, 6).requires_grad_()
    wanted = terms_and_gradients(student, [LossInputs.of_one_process(student, teacher, sentences, bank)])
    shares = [
        LossInputs(
            local_student=student[images],  # the slice of the gathered ones, so that both gradients meet in them
            local_teacher=teacher[images],
            global_student=student,
            global_teacher=teacher,
            local_others=sentences[texts],
            global_others=sentences,
            bank=bank,
        )
        for images, texts in zip(*([slice(*pair) for pair in itertools.pairwise(at)] for at in cuts))
    ]
    found = terms_and_gradients(student, shares)
    assert set(found) == set(wanted) == {"vl", "pvl", "udist", "feature"}
    pure = {
        "vl": vl_loss(student, teacher, sentences, 1.0, 10.0),
        "pvl": pvl_loss(student, teacher, 3.0, 10.0, bank),
        "udist": udist_loss(student, teacher, 7.0, 10.0),
        "feature": feature_loss(student, teacher),
    }
    for name, (loss, gradient) in wanted.items():
        assert loss == pure[name]
        torch.testing.assert_close(found[name][0], loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(found[name][1], gradient, rtol=1e-12, atol=1e-12 * gradient.abs().max().item())


def test_inputs_of_several_processes_that_do_not_fit_are_refused():
    student, teacher, sentences = embeddings(2, 6), embeddings(2, 6, seed=1), embeddings(3, 6, seed=2)
    inputs = {"local_student": student, "local_teacher": teacher, "global_student": embeddings(4, 6)}
    weights, temperature = LossSettings(vl=1.0), TemperatureSettings()
    with pytest.raises(ValueError, match="4 rows of the student's against 5"):
        terms_of(LossInputs(**inputs, global_teacher=embeddings(5, 6)), weights, temperature, 10.0)
    inputs["global_teacher"] = embeddings(4, 6)
    with pytest.raises(ValueError, match="both or neither"):
        terms_of(LossInputs(**inputs, local_others=sentences), weights, temperature, 10.0)
    with pytest.raises(ValueError, match="no local_others in this step, but a loss wants them"):
        terms_of(LossInputs(**inputs), weights, temperature, 10.0)


def test_effective_candidates_count_what_a_softmax_spreads_over():
    rows = torch.tensor([[1.0, 0.0]])
    same = rows.expand(7, 2)
    assert effective_candidates(rows, same, 1.0, 100.0).item() == pytest.approx(7)
    one_of_many = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    assert effective_candidates(rows, one_of_many, 1.0, 100.0).item() == pytest.approx(1)
    # Two candidates at odds e : 1, by hand: p = .7311, entropy .5822 nats.
    assert effective_candidates(rows, torch.eye(2), 1.0, 1.0).item() == pytest.approx(np.exp(0.58220), rel=1e-4)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (torch.ones(3, 4), torch.ones(2, 4), "3 rows of the student's against 2"),
        (torch.ones(1, 4), torch.ones(4), "teacher: "),
        (torch.ones(0, 4), torch.ones(0, 4), "student: "),
        (torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4), "floats"),
    ],
)
def test_shapes_that_would_broadcast_are_refused(student, teacher, message):
    for loss in (pvl_loss, udist_loss, feature_loss):
        with pytest.raises(ValueError, match=message):
            loss(student, teacher)


def test_sentences_of_another_width_and_a_temperature_of_0_are_refused():
    teacher = torch.ones(2, 4)
    with pytest.raises(ValueError, match="local_others: 5 wide, the teacher's embeddings are 4"):
        vl_loss(teacher, teacher, torch.ones(3, 5))
    with pytest.raises(ValueError, match="above 0"):
        pvl_loss(teacher, teacher, temperature=0.0)
