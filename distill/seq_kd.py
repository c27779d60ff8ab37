"""Sequence-level distillation: let the teacher write, and train the student on what it wrote (Kim and Rush, 1606.07947)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from compress.distill.fine_tune import FineTune
from compress.passes import Needs, Taxon
from compress.rollouts import Rollouts
from compress.train_pass import Batch


class SeqKD(FineTune):
    """The teacher goes on from the beginnings of the text's sequences, or from the prompts of records, and what it wrote is
    predicted, next token by next token. Of the teacher nothing is used but its text: what another model wrote, behind an
    interface say, is trained on with ``fine_tune:data=FILE``, of rows with ``prompt`` and ``completion``.

    See :class:`TrainPass` for the training fields.
    """

    taxon: ClassVar[Taxon] = Taxon.BLACK_BOX
    paper: ClassVar[str] = "1606.07947"
    needs: ClassVar[Needs] = Needs(teacher=True)

    temperature: float = Field(1.0, gt=0, description="divides the teacher's logits when it writes; near 0: always the likeliest")
    prompt: float = Field(0.25, ge=0, lt=1, description="share of a sequence that is given, where the data has no prompts")

    def prepare(self, batch: Batch, rollouts: Rollouts) -> Batch:
        return rollouts.rewrite(batch, self.prompt, temperature=self.temperature, teacher=1.0)
