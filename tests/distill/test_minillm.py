"""Section 7.2's checks: rewards, importance weights, and that the gradient is that of the reverse KL between texts."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch

from compress.distill.minillm import MiniLLM, policy_terms, rewards_after
from compress.rollouts import LOG_CHANCES
from compress.signals import signal_of
from compress.train_pass import Batch


def test_rewards_after_is_a_discounted_mean():
    written = torch.tensor([[False, True, True, True], [False, False, True, True]])
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    expected = torch.tensor([(2 + 0.5 * 4) / 1.5, 4.0, 0.0, 16.0, 0.0])
    torch.testing.assert_close(rewards_after(rewards, written, 0.5), expected)
    torch.testing.assert_close(rewards_after(rewards, written, 1.0)[0], torch.tensor(3.0))


def test_a_part_of_the_batch_is_written_and_the_rest_is_text(batch, rollouts):
    batch = batch._replace(counted=None)
    prepared = MiniLLM(text=0.5).prepare(batch, rollouts)
    assert prepared.counted is not None
    assert torch.equal(prepared.tokens[:2], batch.tokens[:2]) and prepared.counted[:2].all()
    assert torch.equal(prepared.tokens[2:, :5], batch.tokens[2:, :5])
    assert torch.equal(prepared.counted[2:], (torch.arange(10) >= 5).expand(2, -1))
    assert not prepared.extras["written"][:2].any() and prepared.extras["written"][2:].sum() == 10


@pytest.mark.parametrize("text", [0.0, 0.5])
def test_the_teacher_itself_has_no_reward_and_no_loss(text, batch, rollouts, models):
    own = rollouts._replace(teacher=models[0])
    prepared = MiniLLM(text=text).prepare(batch, own)
    signal = signal_of(models[0], prepared)
    assert MiniLLM(text=text, kd_ratio=1.0).loss(signal, signal, prepared) == 0


def test_importance_weights_are_one_without_the_teachers_help(batch, rollouts, models):
    step = MiniLLM(mix=0.0, text=0.0)
    prepared = step.prepare(batch, rollouts)
    log_q = signal_of(models[0], prepared)
    chances = log_q.head(log_q.hidden).log_softmax(-1).gather(1, prepared.targets[:, None])[:, 0]
    torch.testing.assert_close(prepared.at_predicted(prepared.extras[LOG_CHANCES]), chances, rtol=0, atol=1e-4)
    helped = MiniLLM(mix=0.4, text=0.0).prepare(batch, rollouts)
    ratio = (log_q_of(models[0], helped) - helped.at_predicted(helped.extras[LOG_CHANCES])).exp()
    assert ratio.min() > 0 and ratio.max() <= 1 / 0.6 + 1e-3


def log_q_of(model, batch: Batch) -> torch.Tensor:
    signal = signal_of(model, batch)
    return signal.head(signal.hidden).log_softmax(-1).gather(1, batch.targets[:, None])[:, 0].detach()


def test_the_gradient_is_that_of_the_reverse_kl_between_texts(models):
    """Every continuation by two tokens, as often as the student writes it: no sampling, and no noise."""
    student, teacher = (copy.deepcopy(model) for model in models)
    for model in (student, teacher):
        model.resize_token_embeddings(6)
    head = student.lm_head.weight.requires_grad_(True)
    texts = torch.tensor([[3, first, second] for first, second in product(range(6), repeat=2)])

    def log_chances(model) -> torch.Tensor:
        return model(texts).logits[:, :-1].log_softmax(-1)

    of_student, of_teacher = log_chances(student), log_chances(teacher).detach()
    log_q, log_p = (each.gather(2, texts[:, 1:, None])[..., 0] for each in (of_student, of_teacher))
    chances = log_q.sum(1).exp()
    (expected,) = torch.autograd.grad((chances * (log_q - log_p).sum(1)).sum(), head, retain_graph=True)
    exact = (of_student.exp() * (of_student - of_teacher)).sum(-1)
    written = torch.tensor([False, True, True]).expand(36, -1)
    later = rewards_after((log_p - log_q).detach().flatten(), written, 1.0)
    terms = policy_terms(log_q.flatten(), exact.flatten(), later - 0.7).view(36, 2)
    (found,) = torch.autograd.grad((chances.detach()[:, None] * terms).sum(), head)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expected.abs().max() > 0.1
