"""T14: what a divergence must satisfy, and that chunking changes its memory and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compress.distill.losses import chunked_forward_kl, forward_kl


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_forward_kl_is_the_definition():
    student, teacher = logits(5, 11, seed=1), logits(5, 11, seed=2)
    p, q = teacher.softmax(-1), student.softmax(-1)
    torch.testing.assert_close(forward_kl(student, teacher), (p * (p / q).log()).sum(-1))


def test_forward_kl_is_zero_at_equality_and_positive_elsewhere():
    student = logits(50, 17)
    assert forward_kl(student, student + 2).abs().max() < 1e-10
    assert forward_kl(student, logits(50, 17, seed=1)).min() > 0


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


def test_padded_vocabularies_are_cut_to_the_common_size():
    student, teacher = logits(5, 11, seed=1), logits(5, 11, seed=2)
    padded = torch.cat([teacher, logits(5, 5, seed=3)], dim=-1)
    assert torch.equal(forward_kl(student, padded), forward_kl(student, teacher))
    assert torch.equal(forward_kl(padded, student), forward_kl(teacher, student))


def test_log_softmax_is_taken_in_float32():
    student, teacher = logits(5, 11, seed=1).bfloat16(), logits(5, 11, seed=2).bfloat16()
    loss = forward_kl(student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, forward_kl(student.float(), teacher.float()), rtol=0, atol=0)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_change_neither_value_nor_gradients(chunk):
    """The student's head is trained too, and caps its logits: a head is any function."""
    torch.manual_seed(0)
    student_head, teacher_head = nn.Linear(6, 11).double(), nn.Linear(9, 13).double()
    teacher_hidden = logits(7, 9)

    def run(loss) -> list[Tensor]:
        hidden = logits(7, 6, seed=1).requires_grad_()
        value = loss(hidden, lambda h: torch.tanh(student_head(h) / 5) * 5)
        return [value, *torch.autograd.grad(value, [hidden, *student_head.parameters()])]

    whole = run(lambda hidden, head: forward_kl(head(hidden), teacher_head(teacher_hidden), 2.0).sum())
    parts = run(lambda hidden, head: chunked_forward_kl(hidden, head, teacher_hidden, teacher_head, 2.0, chunk))
    for ours, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_teacher_takes_no_gradient():
    student, teacher, head = logits(4, 3).requires_grad_(), logits(4, 3).requires_grad_(), nn.Linear(3, 5).double()
    chunked_forward_kl(student, head, teacher, head, 1.0, 2).backward()
    assert teacher.grad is None and student.grad is not None


def test_different_numbers_of_tokens_are_refused():
    with pytest.raises(ValueError, match="3 student tokens but 4 teacher tokens"):
        chunked_forward_kl(logits(3, 2), nn.Identity(), logits(4, 2), nn.Identity())


class LargestTensor(TorchDispatchMode):
    """Record how many elements the largest tensor has that any operation makes, forward or backward."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_memory_is_bounded_by_the_chunk_and_not_by_the_tokens():
    tokens, width, vocabulary, chunk = 256, 8, 50_000, 16
    torch.manual_seed(0)
    student_head, teacher_head = nn.Linear(width, vocabulary), nn.Linear(width, vocabulary)
    student_head.requires_grad_(False)
    hidden, teacher_hidden = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)
    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with LargestTensor() as made, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunked_forward_kl(hidden, student_head, teacher_hidden, teacher_head, 1.0, chunk).backward()
    assert made.elements == chunk * vocabulary
    assert sum(saved) <= 2 * tokens * width  # the hidden states of both models
