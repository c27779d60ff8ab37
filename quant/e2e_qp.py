"""E2E-QP: train the scales of grids, end to end, to predict the next token; codes and zero-points stay (phase two of
EfficientQAT, Chen et al., 2407.11062)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from compress.distill.objective import Objective
from compress.passes import Taxon


class E2EQP(Objective):
    """After a quantizer, such as ``block_ap``: a scale per group is all that moves, so that a step takes hardly more memory than
    the model and its activations. What is on no grid stays as it is, factors and corrections beside grids too.

    Published are 128 steps of 32 sequences of 4096 tokens, with scales that move by 2e-5 a step at 2 bits and by half of that
    at 3 and 4: a ``learning_rate`` of 4e-5 to 8e-5 for Llama 2. ``objective=kl`` and ``tsld`` distil instead. See
    :class:`TrainPass` for the training fields.
    """

    taxon: ClassVar[Taxon] = Taxon.QAT
    paper: ClassVar[str] = "2407.11062"

    objective: Literal["kl", "tsld", "ce"] = Field(
        "ce",
        description="ce: of the next token; kl: to the uncompressed model's predictions; tsld: the same, tokens weighted by how "
        "unsure that model is",
    )
    gradient_clip: float = Field(0.3, gt=0, description="largest norm of all gradients together")
    trains: Literal["scales"] = Field("scales", description="scales of grids")
