"""MiniLLM: reverse KL between whole texts, minimised by policy gradient on what the student writes (Gu et al., 2306.08543)."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.distill.losses import cross_entropy, forward_kl, per_token, reverse_kl
from compress.distill.white_box import WhiteBox
from compress.passes import Taxon
from compress.rollouts import LOG_CHANCES, Rollouts
from compress.train_pass import Batch, Signal

_WRITTEN = "written"


class MiniLLM(WhiteBox):
    """Most of a batch is continued from its beginnings by a mixture of the student with ``mix`` of the teacher (whose help keeps
    a poor student off text that only fools the teacher). Its reward for a token y is ln p(y) - ln q(y). What a token does to its
    own reward is differentiated exactly, as the reverse KL at its place; what it does to those after it by policy gradient,
    with the discounted mean of the later rewards, less its mean over the batch. Importance weights q / mixture correct for the
    teacher's help, token by token. The rest of the batch is plain text, with a loss of half next token, half forward KL.

    Every text is used for one step and then written anew: the ratio that PPO clips is 1, and so nothing is clipped. Nor are
    rewards divided by their deviation: their size says how far the student still is. Start from a student that can write.
    See :class:`TrainPass` for the training fields.
    """

    taxon: ClassVar[Taxon] = Taxon.WHITE_BOX
    paper: ClassVar[str] = "2306.08543"

    mix: float = Field(0.2, ge=0, lt=1, description="the teacher's share of the distribution that texts are drawn from")
    discount: float = Field(0.95, ge=0, le=1, description="of a reward by each token that it is further away")
    text: float = Field(0.5, ge=0, lt=1, description="share of the sequences that stay plain text")
    kd_ratio: float = Field(0.5, ge=0, le=1, description="of the loss on plain text: forward KL; the rest is of the next token")
    prompt: float = Field(0.5, ge=0, lt=1, description="share of a sequence that is given, where the data has no prompts")

    def prepare(self, batch: Batch, rollouts: Rollouts) -> Batch:
        n_text = int(self.text * len(batch.tokens))
        rewritten = rollouts.rewrite(batch, self.prompt, temperature=self.temperature, teacher=self.mix)
        written, counted = rewritten.counted, torch.ones_like(batch.tokens, dtype=torch.bool)
        assert written is not None
        plain = torch.arange(len(counted), device=counted.device)[:, None] < n_text
        return batch._replace(
            tokens=torch.where(plain, batch.tokens, rewritten.tokens),
            counted=torch.where(plain, counted if batch.counted is None else batch.counted, written),
            extras={**rewritten.extras, _WRITTEN: written & ~plain},
        )

    def loss(self, student: Signal, teacher: Signal | None, batch: Batch) -> Tensor:
        """Mean over written tokens of what has the gradient above and the value of the reverse KL, in nats, and that over plain
        tokens of the other loss."""

        def measures(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
            vocabulary = min(student_logits.shape[-1], teacher_logits.shape[-1])
            ours, theirs = (logits[:, :vocabulary].float() / self.temperature for logits in (student_logits, teacher_logits))
            log_q, log_p = -cross_entropy(ours, targets), -cross_entropy(theirs, targets)
            plain = self.kd_ratio * forward_kl(student_logits, teacher_logits)
            plain = plain + (1 - self.kd_ratio) * cross_entropy(student_logits, targets)
            return torch.stack([log_q, log_p, reverse_kl(ours, theirs), plain], -1)

        measured = per_token(measures, student, self.given(teacher), batch.targets, chunk=self.chunk)
        if _WRITTEN not in batch.extras:  # held-out text, by which a run is judged
            return measured[:, 3].mean()
        written, log_chances = (batch.at_predicted(batch.extras[name]) for name in (_WRITTEN, LOG_CHANCES))
        plain = measured[~written, 3]
        log_q, log_p, exact, _ = measured[written].unbind(-1)
        old = log_q.detach()
        later = rewards_after((log_p - old).detach(), batch.extras[_WRITTEN], self.discount)
        weights = (old - log_chances[written]).exp() if self.mix else torch.ones_like(old)
        policy = weights * policy_terms(log_q, exact, later - later.mean())
        return policy.sum() / max(len(policy), 1) + plain.sum() / max(len(plain), 1)


def policy_terms(log_q: Tensor, exact: Tensor, advantages: Tensor) -> Tensor:
    """The reverse KL at each written token's place, with the gradient of that of the text from there on: (tokens,) all.

    log_q: of the token, differentiable. exact: the reverse KL over the vocabulary at its place, differentiable. advantages: what
    the later tokens earn, less anything that does not depend on this one.
    """
    return exact - advantages * (log_q - log_q.detach())


def rewards_after(rewards: Tensor, written: Tensor, discount: float) -> Tensor:
    """The discounted mean of the rewards of each text's later tokens; 0 for the last of them.

    rewards: (tokens,), of the written tokens, text after text. written: (n, length) bool, where in the batch these are.
    """
    grid = rewards.new_zeros(written.shape).masked_scatter(written, rewards)
    mask, sums, counts = written.to(grid.dtype), torch.zeros_like(grid), torch.zeros_like(grid)
    for column in range(written.shape[1] - 2, -1, -1):
        after = column + 1
        sums[:, column] = torch.where(written[:, after], grid[:, after] + discount * sums[:, after], sums[:, after])
        counts[:, column] = torch.where(written[:, after], mask[:, after] + discount * counts[:, after], counts[:, after])
    return (sums / counts.clamp_min(1))[written]
