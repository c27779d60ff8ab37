"""WeLore: ranks by one threshold on every layer's normalised singular values (Jaiswal et al., 2407.11239)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from compress.lowrank.factor import Factoriser
from compress.passes import Taxon


class WeLore(Factoriser):
    """Layers with heavy-tailed spectra are cut to low rank; those that would lose less than half of their ranks stay whole.

    The threshold is the one that meets ``ratio``. What is trained afterwards, the factors alone, is the training's to choose.
    """

    taxon: ClassVar[Taxon] = Taxon.LOW_RANK
    paper: ClassVar[str] = "2407.11239"

    ranks: Literal["threshold"] = Field("threshold", description="one threshold on normalised singular values")  # type: ignore[assignment]
