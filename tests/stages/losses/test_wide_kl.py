"""The KL in blocks against the plain formula and autograd, at every border that blocks can have; and what it keeps."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dimefm.stages.losses import similarity_blocks
from dimefm.stages.losses.diagnostics import effective_candidates
from dimefm.stages.losses.dime import pvl_loss, udist_loss, vl_loss
from dimefm.stages.losses.similarity_blocks import block_shape
from dimefm.stages.losses.wide_kl import kl_both_ways, kl_rows, row_entropies

from ...support.losses import embeddings

CPU = torch.device("cpu")


def plain_kl(teacher_rows, student_rows, teacher_columns, student_columns, factor):
    """Sums over rows, and over columns, of KL: whole matrices of logits, and autograd. The stack's own softmax."""
    dtype = torch.float64 if student_rows.dtype == torch.float64 else torch.float32
    sides = (teacher_rows, student_rows, teacher_columns, student_columns)
    t_rows, s_rows, t_columns, s_columns = (F.normalize(side.to(dtype), dim=1) for side in sides)
    sums = []
    for axis in (1, 0):
        log_p = F.log_softmax(factor * t_rows @ t_columns.T, dim=axis)
        log_q = F.log_softmax(factor * s_rows @ s_columns.T, dim=axis)
        sums.append((log_p.exp() * (log_p - log_q)).sum())
    return sums


def value_and_gradients(loss, *leaves):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = loss(*leaves)
    value.backward()
    return value.detach(), *(leaf.grad for leaf in leaves)


def agree(found, wanted, rtol=1e-12):
    """Each tensor to rtol, an element near 0 to rtol of the largest one of its tensor."""
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * max(1e-3, other.abs().max().item()))


def all_the_same(num_rows, num_columns, block, factor=8.0, seed=0, rtol=1e-12):
    """Rows alone, columns alone, both ways; gradients to rows, to columns and to both."""
    teacher, student = embeddings(num_rows, 5, seed=seed), embeddings(num_rows, 6, seed=seed + 1)
    columns, students_columns = embeddings(num_columns, 5, seed=seed + 2), embeddings(num_columns, 6, seed=seed + 3)
    like_teacher = embeddings(num_rows, 5, seed=seed + 4)

    def ours(rows, cols):
        return kl_rows(teacher, rows, columns, cols, factor, block=block)

    def plain(rows, cols):
        return plain_kl(teacher, rows, columns, cols, factor)[0]

    agree(value_and_gradients(ours, student, students_columns), value_and_gradients(plain, student, students_columns))
    agree(
        value_and_gradients(lambda rows: ours(rows, students_columns), student),
        value_and_gradients(lambda rows: plain(rows, students_columns), student),
        rtol,
    )
    agree(
        value_and_gradients(lambda cols: kl_rows(columns, columns, teacher, cols, factor, block=block), like_teacher),
        value_and_gradients(lambda cols: plain_kl(columns, columns, teacher, cols, factor)[0], like_teacher),
        rtol,
    )

    def ours_both(rows):
        return kl_both_ways(teacher, rows, columns, columns, factor, 0.3, 0.5, block=block)

    def plain_both(rows):
        over_columns, over_rows = plain_kl(teacher, rows, columns, columns, factor)
        return 0.3 * over_columns + 0.5 * over_rows

    agree(value_and_gradients(ours_both, like_teacher), value_and_gradients(plain_both, like_teacher), rtol)


@pytest.mark.parametrize("block", [(1, 1), (1, 11), (7, 1), (3, 4), (7, 11), (7, 4), (2, 11), (100, 100), (6, 10)])
def test_any_block_gives_the_plain_loss_and_gradient(block):
    all_the_same(7, 11, block)
    all_the_same(11, 7, block, seed=20)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 10), st.integers(1, 10), st.sampled_from([0.5, 10.0, 40.0]))
def test_any_shape_and_block_give_the_plain_loss_and_gradient(num_rows, num_columns, high, wide, factor):
    all_the_same(num_rows, num_columns, (high, wide), factor, seed=num_rows + 10 * num_columns)


@pytest.mark.parametrize("block", [(1, 1), (3, 4), (7, 11)])
def test_one_hot_softmaxes_give_the_plain_loss_and_gradient(block):
    # Logits of 3e4: their own last bit is 4e-12, and that is what a softmax is known to.
    all_the_same(7, 11, block, factor=3e4, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_a_hundred_thousand_overflow_nothing_in_blocks(dtype):
    rows = torch.eye(3, dtype=dtype)
    loss, gradient = value_and_gradients(lambda student: kl_rows(rows, student, rows, rows, 1e5, (2, 2)), -rows)
    # By hand: the teacher is sure of its own column, where the student has -1e5 against 0 twice: 1e5 + log 2 a row.
    assert loss.item() == pytest.approx(3e5 + 3 * torch.tensor(2.0).log().item(), rel=1e-6)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("block", [(1, 1), (3, 4), (7, 11)])
def test_a_student_that_matches_has_no_loss_and_no_gradient(block):
    teacher, columns = embeddings(7, 5, dtype=torch.float32), embeddings(11, 5, seed=1, dtype=torch.float32)
    for factor in (1.0, 100.0):
        loss, gradient = value_and_gradients(
            lambda rows, factor=factor: kl_both_ways(teacher, rows, columns, columns, factor, 1.0, 1.0, block=block),
            teacher,
        )
        assert loss == 0 and gradient.abs().max() < 1e-7 * factor


@pytest.mark.parametrize("block", [(2, 3), (4, 6)])
def test_rows_of_zeros_are_uniform_as_in_the_plain_formula(block):
    teacher, student, columns = embeddings(4, 5), embeddings(4, 5, seed=1), embeddings(6, 5, seed=2)
    teacher[0], student[1], columns[2], teacher[3], student[3] = 0, 0, 0, 0, 0

    def ours(rows):
        return kl_rows(teacher, rows, columns, columns, 5.0, block)

    found = value_and_gradients(ours, student)
    wanted = value_and_gradients(lambda rows: plain_kl(teacher, rows, columns, columns, 5.0)[0], student)
    agree(found, wanted)
    agree((found[1][[0, 2]],), (wanted[1][[0, 2]],))  # the gradient of a row of zeros is 1e12 times the others'


@pytest.mark.parametrize("block", [(4, 6), (2, 3), (4, 2), (1, 6)])
def test_gradients_are_those_of_finite_differences(block):
    teacher, columns = embeddings(4, 5, seed=1), embeddings(6, 5, seed=2)
    student, students_columns = embeddings(4, 3, seed=3).requires_grad_(), embeddings(6, 3, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda rows, cols: kl_both_ways(teacher, rows, columns, cols, 6.0, 2.0, 0.5, block=block),
        (student, students_columns),
    )
    assert torch.autograd.gradcheck(
        lambda rows: kl_rows(teacher, rows, teacher, rows, 6.0, (min(block), min(block))), student
    )


@pytest.mark.parametrize("block", [(4, 6), (2, 3)])
def test_a_second_derivative_is_refused(block):
    student = embeddings(4, 5).requires_grad_()
    loss = kl_rows(embeddings(4, 5, seed=1), student, *[embeddings(6, 5, seed=2)] * 2, 6.0, block)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, student, create_graph=True)


def test_gradient_scales_with_what_comes_from_above():
    teacher, student, columns = embeddings(4, 5), embeddings(4, 5, seed=1), embeddings(6, 5, seed=2)
    for block in ((4, 6), (2, 3)):
        (_, one) = value_and_gradients(lambda rows, b=block: kl_rows(teacher, rows, columns, columns, 6.0, b), student)
        (_, many) = value_and_gradients(
            lambda rows, b=block: 65536 * kl_rows(teacher, rows, columns, columns, 6.0, b), student
        )
        torch.testing.assert_close(many, 65536 * one, rtol=1e-14, atol=0)


def test_parts_read_as_if_they_were_stacked():
    teacher, student = embeddings(4, 5), embeddings(4, 5, seed=1)
    parts = tuple(embeddings(length, 5, seed=length) for length in (2, 3, 1, 6))
    for block in ((4, 12), (3, 5), (4, 1)):
        found = value_and_gradients(lambda rows, b=block: kl_rows(teacher, rows, parts, parts, 6.0, b), student)
        whole = torch.cat(parts)
        wanted = value_and_gradients(lambda rows, whole=whole: plain_kl(teacher, rows, whole, whole, 6.0)[0], student)
        agree(found, wanted)
    with pytest.raises(ValueError, match="several parts"):
        kl_rows(teacher, student, parts, (parts[0].clone().requires_grad_(), *parts[1:]), 6.0)


@pytest.mark.parametrize("cached", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", [(6, 9), (4, 4)])
def test_cached_halves_count_as_their_float32_values(cached, block):
    teacher, columns = embeddings(6, 8, dtype=cached), embeddings(9, 8, seed=1, dtype=cached)
    student = embeddings(6, 8, seed=2, dtype=torch.float32)
    found = value_and_gradients(lambda rows: kl_rows(teacher, rows, columns, columns, 9.0, block), student)
    wanted = value_and_gradients(lambda rows: plain_kl(teacher, rows, columns, columns, 9.0)[0], student)
    assert found[0].dtype == torch.float32
    agree(found, wanted, rtol=1e-5)


def test_without_gradients_the_value_is_the_same():
    teacher, student, columns = embeddings(6, 8), embeddings(6, 8, seed=1), embeddings(9, 8, seed=2)
    (value, _) = value_and_gradients(lambda rows: kl_rows(teacher, rows, columns, columns, 9.0), student)
    with torch.no_grad():
        assert kl_rows(teacher, student.requires_grad_(), columns, columns, 9.0) == value


def test_inputs_that_were_overwritten_before_backward_are_refused():
    teacher, student, columns = embeddings(6, 8), embeddings(6, 8, seed=1).requires_grad_(), embeddings(9, 8, seed=2)
    loss = kl_rows(teacher, student, columns, columns, 9.0, (6, 4))
    columns.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_and_coarse_products_change_no_bit_in_blocks(monkeypatch):
    monkeypatch.setattr(similarity_blocks, "_WHOLE", 1)
    monkeypatch.setattr(similarity_blocks, "_CPU_BLOCK", 40_000)
    # 300 wide so that the coarse kernels are really chosen; on the CPU "medium" may round products to bf16.
    student, teacher, sentences = (embeddings(64, 300, seed=seed, dtype=torch.float32) for seed in range(3))
    assert block_shape(64, 64, 300, CPU, both_ways=True) != (64, 64)

    def losses(leaf):
        return vl_loss(leaf, teacher, sentences) + pvl_loss(leaf, teacher) + udist_loss(leaf, teacher)

    plain, before = value_and_gradients(losses, student), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            coarse = value_and_gradients(losses, student)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert all((one == other).all() for one, other in zip(coarse, plain))


class Largest(TorchDispatchMode):
    """Bytes of the largest piece of memory that any operation makes, forward and backward."""

    def __init__(self, *inputs):
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in inputs}
        self.num_bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._known:
                self.num_bytes = max(self.num_bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("num_columns", [2_000, 10_000])
def test_nothing_is_made_that_grows_with_the_columns(monkeypatch, num_columns):
    monkeypatch.setattr(similarity_blocks, "_WHOLE", 20_000)
    monkeypatch.setattr(similarity_blocks, "_CPU_BLOCK", 20_000)
    student, teacher = embeddings(16, 32, dtype=torch.float32).requires_grad_(), embeddings(16, 32, dtype=torch.float16)
    columns = embeddings(num_columns, 32, dtype=torch.float16)
    with Largest(student, teacher, columns) as made:
        (vl_loss(student, teacher, columns) + pvl_loss(student, teacher, bank_images=columns)).backward()
        effective_candidates(teacher, columns, 1.0, 100.0)
    # A block's numbers in float32. The columns alone are 0.1 MB and 0.6 MB in float16, twice that in float32.
    assert made.num_bytes <= 4 * 20_000


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("width", [1, 64, 768, 4096])
def test_a_block_and_its_copies_stay_within_their_numbers(width, both_ways):
    for num_rows in (1, 5, 256, 4096, 12_288, 1_000_000):
        for num_columns in (1, 7, 256, 4096, 12_288, 1_000_000):
            high, wide = block_shape(num_rows, num_columns, width, CPU, both_ways=both_ways)
            assert 1 <= high <= num_rows and 1 <= wide <= num_columns
            assert high * wide + (high + wide) * width <= 16 * 2**20
    assert block_shape(256, 12_288, 768, CPU, both_ways=True) == (256, 12_288)  # the paper's sentences in one piece


def test_entropies_are_those_of_the_whole_softmax_in_any_block():
    rows, columns = embeddings(7, 5), (embeddings(3, 5, seed=1), embeddings(8, 5, seed=2))
    log_p = F.log_softmax(20 * F.normalize(rows, dim=1) @ F.normalize(torch.cat(columns), dim=1).T, dim=1)
    wanted = -(log_p.exp() * log_p).sum(dim=1)
    for block in ((7, 11), (2, 3), (1, 1), (7, 4), (3, 11)):
        torch.testing.assert_close(row_entropies(rows, columns, 20.0, block), wanted, rtol=1e-12, atol=1e-13)
