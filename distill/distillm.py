"""DistiLLM: skewed divergences, and texts of the student's that are kept and used again (Ko et al., 2402.03898)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.distill.white_box import Divergent
from compress.passes import Taxon
from compress.rollouts import Rollouts
from compress.train_pass import Batch, Signal


class DistiLLM(Divergent):
    """A batch is the student's own writing with a probability that starts at ``student_text`` and rises by a tenth whenever the
    loss on held-out text, where the run measures it, is worse than the last time by ``tolerance``. At first such batches are
    written anew; the further the training, the more of them come out of the last ``kept`` sequences that it wrote, which costs
    no sampling. What others compute as skewed cross-entropies are divergences here: 0 where nothing is left to learn.

    See :class:`TrainPass` for the training fields.
    """

    taxon: ClassVar[Taxon] = Taxon.WHITE_BOX
    paper: ClassVar[str] = "2402.03898"

    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "adaptive_kl"] = Field(
        "skew_kl", description="what is minimised between the two models' predictions"
    )
    student_text: float = Field(0.5, ge=0, le=1, description="share of the batches that the student writes, at first")
    tolerance: float = Field(0.1, ge=0, description="nats by which held-out loss may rise before the student writes more")
    kept: int = Field(1000, ge=1, description="sequences of the student's that are remembered")
    prompt: float = Field(0.5, ge=0, lt=1, description="share of a sequence that is given, where the data has no prompts")

    def prepare(self, batch: Batch, rollouts: Rollouts) -> Batch:
        chance, share = rollouts.chance(batch.index), self.share(rollouts.held_out)
        if chance >= share:
            return batch
        if "texts" not in rollouts.memory or chance < share * (1 - batch.index / self.steps):
            batch = rollouts.rewrite(batch, self.prompt, temperature=self.temperature)
            assert batch.counted is not None
            for name, values in (("texts", batch.tokens), ("counted", batch.counted.byte())):  # not all backends gather bools
                older = rollouts.memory.get(name, values[:0])
                rollouts.memory[name] = torch.cat([older, rollouts.gather(values)])[-self.kept :]
            return batch
        texts = rollouts.memory["texts"]
        generator = rollouts.generator(batch.tokens, batch.index)
        rows = torch.randint(len(texts), (len(batch.tokens),), generator=generator, device=texts.device)
        return batch._replace(tokens=texts[rows], counted=rollouts.memory["counted"][rows].bool())

    def share(self, held_out: Sequence[tuple[int, float]]) -> float:
        """Of the batches, that which the student writes, given (steps done, loss) on held-out text so far."""
        rises = sum(later > earlier + self.tolerance for (_, earlier), (_, later) in pairwise(held_out))
        return min(1.0, self.student_text + 0.1 * rises)

    def loss(self, student: Signal, teacher: Signal | None, batch: Batch) -> Tensor:
        """Mean of the divergence over tokens, in nats."""
        return self.divergences(student, teacher).mean()
