"""T14: what a divergence must satisfy, and that evaluating it by chunks changes its memory and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compress.distill.losses import (
    adaptive_kl,
    cross_entropy,
    entropy,
    forward_kl,
    jsd,
    per_token,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
)
from compress.train_pass import Signal

DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl, "reverse_kl": reverse_kl, "adaptive_kl": adaptive_kl, "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl, **{f"jsd {beta}": partial(jsd, beta=beta) for beta in (0, 0.1, 0.5, 0.9, 1)},
}  # fmt: skip
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@each_divergence
def test_equal_logits_give_exactly_zero(divergence, temperature, dtype):
    same = (4 * logits(40, 333)).to(dtype)
    student = same.clone().requires_grad_()
    value = divergence(student, same.clone(), temperature)
    assert torch.equal(value, torch.zeros_like(value))
    value.sum().backward()
    assert student.grad is not None and student.grad.abs().max() < (1e-10 if dtype == torch.float64 else 1e-5)


@each_divergence
def test_a_divergence_is_positive_and_has_the_right_gradient(divergence):
    student, teacher = logits(6, 11, seed=1), logits(6, 11, seed=2)
    assert divergence(logits(50, 17), logits(50, 17, seed=1)).min() > 0
    if divergence is not adaptive_kl:  # whose weights take none
        close = torch.cat([student[:3], teacher[3:] + 1e-3 * student[3:]]).requires_grad_()
        assert torch.autograd.gradcheck(lambda each: divergence(each, teacher, 1.5), close)


@each_divergence
def test_padded_vocabularies_are_cut_to_the_common_size(divergence):
    student, teacher = logits(5, 11, seed=1), logits(5, 11, seed=2)
    padded = torch.cat([teacher, logits(5, 5, seed=3)], dim=-1)
    assert torch.equal(divergence(student, padded), divergence(student, teacher))
    assert torch.equal(divergence(padded, student), divergence(teacher, student))


@each_divergence
def test_log_softmax_is_taken_in_float32(divergence):
    student, teacher = logits(5, 11, seed=1).bfloat16(), logits(5, 11, seed=2).bfloat16()
    loss = divergence(student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, divergence(student.float(), teacher.float()), rtol=0, atol=0)


@each_divergence
def test_extreme_logits_give_finite_values_and_gradients(divergence):
    student = torch.zeros(1, 4).index_fill(1, torch.tensor([0]), 300.0).requires_grad_()
    value = divergence(student, student.detach().roll(1))
    value.sum().backward()
    assert value.isfinite().all() and student.grad is not None and student.grad.isfinite().all()


def test_each_is_its_definition():
    student, teacher = logits(5, 11, seed=1), logits(5, 11, seed=2)
    p, q = teacher.softmax(-1), student.softmax(-1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    m = 0.3 * p + 0.7 * q
    for value, expected in (
        (forward_kl(student, teacher), kl(p, q)),
        (reverse_kl(student, teacher), kl(q, p)),
        (jsd(student, teacher, beta=0.3), 0.3 * kl(p, m) + 0.7 * kl(q, m)),
        (skew_kl(student, teacher, alpha=0.3), kl(p, m)),
        (skew_reverse_kl(student, teacher, alpha=0.7), kl(q, m)),
        (entropy(teacher), -(p * p.log()).sum(-1)),
    ):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_forward_kl_gradient_is_q_minus_p(temperature):
    student, teacher = logits(5, 11, seed=1).requires_grad_(), logits(5, 11, seed=2)
    forward_kl(student, teacher, temperature).sum().backward()
    q, p = (student.detach() / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    torch.testing.assert_close(student.grad, (q - p) / temperature, rtol=0, atol=1e-10)


def test_forward_kl_tends_to_half_the_squared_distance_at_high_temperature():
    # Hinton et al., equation 4: T^2 KL -> |z - v|^2 / 2N for centred logits, hence the factor T^2.
    student, teacher = (values - values.mean(-1, keepdim=True) for values in (logits(5, 11, seed=1), logits(5, 11, seed=2)))
    temperature = 1e4
    expected = (student - teacher).square().mean(-1) / 2
    torch.testing.assert_close(temperature**2 * forward_kl(student, teacher, temperature), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("beta", [0.01, 0.3, 0.5, 0.99])
def test_jsd_is_bounded_by_the_entropy_of_its_weights(beta):
    apart = torch.tensor([[60.0, -60.0]])
    bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert jsd(logits(200, 5), logits(200, 5, seed=1), beta=beta).max() <= bound
    assert float(jsd(apart, -apart, beta=beta)) == pytest.approx(bound, rel=1e-6)


def test_jsd_tends_to_the_two_divergences():
    student, teacher = logits(20, 7, seed=1) / 3, logits(20, 7, seed=2) / 3
    small = 1e-6
    torch.testing.assert_close(jsd(student, teacher, beta=small) / small, forward_kl(student, teacher), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(jsd(student, teacher, beta=1 - small) / small, reverse_kl(student, teacher), rtol=1e-3, atol=1e-6)
    assert torch.equal(jsd(student, teacher, beta=0.0), forward_kl(student, teacher))
    assert torch.equal(jsd(student, teacher, beta=1.0), reverse_kl(student, teacher))


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.5])
def test_skewed_divergences_are_bounded_where_the_other_model_says_never(alpha):
    apart = torch.tensor([[200.0, -200.0]])
    for divergence in (skew_kl, skew_reverse_kl):
        assert float(divergence(apart, -apart, alpha=alpha)) == pytest.approx(-math.log(alpha), rel=1e-5)


def test_a_cross_entropy_less_the_teachers_entropy_is_the_divergence():
    student, teacher = logits(5, 11, seed=1), logits(5, 11, seed=2)
    soft = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(soft - entropy(teacher), forward_kl(student, teacher), rtol=0, atol=1e-10)
    targets = torch.tensor([0, 3, 3, 10, 7])
    torch.testing.assert_close(cross_entropy(student, targets), F.cross_entropy(student, targets, reduction="none"))


def test_adaptive_kl_is_forward_where_the_head_is_wrong_and_reverse_where_the_tail_is():
    teacher = torch.tensor([[6.0, 6.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    head, tail = (teacher + torch.tensor([shift], dtype=torch.float64) for shift in ([2.0, -2, 0, 0, 0], [0.0, 0, 4, -4, 0]))
    for student, nearest in ((head, forward_kl), (tail, reverse_kl)):
        both = forward_kl(student, teacher), reverse_kl(student, teacher)
        value, aim = adaptive_kl(student, teacher, head=0.9), nearest(student, teacher)
        assert min(both) <= value <= max(both)
        assert (value - aim).abs() < 0.5 * (both[0] - both[1]).abs()


def test_the_k3_estimator_of_reverse_kl_is_unbiased():
    """T15: with r = ln p - ln q at tokens drawn from q, e^r - 1 - r is never negative and has the mean KL(q || p)."""
    student, teacher = logits(1, 20, seed=1) / 3, logits(1, 20, seed=2) / 3
    drawn = torch.multinomial(student.softmax(-1)[0], 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    ratio = (teacher.log_softmax(-1) - student.log_softmax(-1))[0, drawn]
    k3 = ratio.exp() - 1 - ratio
    assert k3.min() >= 0
    assert float(k3.mean()) == pytest.approx(float(reverse_kl(student, teacher)), abs=2e-2)
    assert float(-ratio.mean()) == pytest.approx(float(reverse_kl(student, teacher)), abs=2e-2)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_change_neither_value_nor_gradients(chunk):
    """The student's head is trained too, and caps its logits: a head is any function."""
    torch.manual_seed(0)
    student_head, teacher_head = nn.Linear(6, 11).double(), nn.Linear(9, 13).double()
    teacher, targets = Signal(logits(7, 9), teacher_head), torch.arange(7)

    def head(hidden: Tensor) -> Tensor:
        return torch.tanh(student_head(hidden) / 5) * 5

    def loss(ours: Tensor, theirs: Tensor, wanted: Tensor) -> Tensor:
        return torch.stack([forward_kl(ours, theirs, 2.0), cross_entropy(ours, wanted)], -1)

    def run(measure: Callable[[Tensor], Tensor]) -> list[Tensor]:
        hidden = logits(7, 6, seed=1).requires_grad_()
        value = measure(hidden)
        return [value, *torch.autograd.grad(value.square().sum(), [hidden, *student_head.parameters()])]

    whole = run(lambda hidden: loss(head(hidden), teacher_head(teacher.hidden), targets))
    parts = run(lambda hidden: per_token(loss, Signal(hidden, head), teacher, targets, chunk=chunk))
    for ours, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_without_a_teacher_the_loss_sees_the_student_alone():
    hidden, head, targets = logits(7, 6), nn.Linear(6, 11).double(), torch.arange(7)
    losses = per_token(cross_entropy, Signal(hidden, head), None, targets, chunk=2)
    torch.testing.assert_close(losses, F.cross_entropy(head(hidden), targets, reduction="none"))


def test_the_teacher_takes_no_gradient():
    student, teacher, head = logits(4, 3).requires_grad_(), logits(4, 3).requires_grad_(), nn.Linear(3, 5).double()
    per_token(forward_kl, Signal(student, head), Signal(teacher, head), chunk=2).sum().backward()
    assert teacher.grad is None and student.grad is not None


def test_different_numbers_of_tokens_are_refused():
    with pytest.raises(ValueError, match="3 student tokens, but 4 beside"):
        per_token(forward_kl, Signal(logits(3, 2), nn.Identity()), Signal(logits(4, 2), nn.Identity()))


class LargestTensor(TorchDispatchMode):
    """Record how many elements the largest tensor has that any operation makes, forward or backward."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_a_teacher_makes_chunks_shorter_and_not_the_memory_larger(monkeypatch):
    """By default the logits of both models together stay within the bound."""
    monkeypatch.setattr("compress.distill.losses._LOGITS", 120)
    seen: list[int] = []

    def head(width: int) -> Callable[[Tensor], Tensor]:
        return lambda hidden: hidden.new_zeros(len(hidden), width)

    def note(ours: Tensor, *theirs: Tensor) -> Tensor:
        seen.append(ours.numel() + sum(each.numel() for each in theirs))
        return ours[:, 0]

    for teacher in (None, Signal(logits(40, 2), head(20))):
        seen.clear()
        per_token(note, Signal(logits(40, 2), head(10)), teacher)
        assert max(seen) == 120 and sum(seen) == 40 * (10 if teacher is None else 30)


@pytest.mark.parametrize("divergence", [forward_kl, jsd])
def test_memory_is_bounded_by_the_chunk_and_not_by_the_tokens(divergence):
    tokens, width, vocabulary, chunk = 64, 8, 20_000, 8
    torch.manual_seed(0)
    student_head, teacher_head = nn.Linear(width, vocabulary), nn.Linear(width, vocabulary)
    student_head.requires_grad_(False)
    hidden, teacher_hidden = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)
    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with LargestTensor() as made, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        student, teacher = Signal(hidden, student_head), Signal(teacher_hidden, teacher_head)
        per_token(divergence, student, teacher, chunk=chunk).mean().backward()
    assert made.elements == chunk * vocabulary
    assert sum(saved) <= 2 * tokens * width  # the hidden states of both models
