"""Conditions that a result must meet to be published under its name; MLOps pipelines branch on the exit code."""

from __future__ import annotations

import re

from pydantic import BaseModel

from compress.errors import BadInput
from compress.eval.metrics import Metrics

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


class Gates(BaseModel):
    """None: no condition. min_recovery: mean share of the base's scores. max_kl: nats per token. max_bytes: of weight files."""

    min_recovery: float | None = None
    max_bytes: int | None = None
    max_kl: float | None = None

    def check_measurable(self, evaluates: bool) -> None:
        """Raise :class:`BadInput` for a gate on something that will not be measured."""
        if not evaluates and (self.min_recovery is not None or self.max_kl is not None):
            raise BadInput("--min-recovery and --max-kl need the evaluation; drop --no-eval")

    def missed(self, n_bytes: int, metrics: Metrics | None) -> list[str]:
        """What was missed, in words; empty where everything holds."""
        found = []
        if self.max_bytes is not None and n_bytes > self.max_bytes:
            found.append(f"{n_bytes:,} bytes are more than --max-bytes {self.max_bytes:,}")
        if metrics is not None:
            recovery = metrics.mean_recovery
            if self.min_recovery is not None and (recovery is None or recovery < self.min_recovery):
                found.append(f"recovery {recovery} is below --min-recovery {self.min_recovery}")
            divergence = metrics.fidelity.kl_mean if metrics.fidelity else None
            if self.max_kl is not None and (divergence is None or divergence > self.max_kl):
                found.append(f"KL {divergence} is above --max-kl {self.max_kl}")
        return found


def parse_bytes(text: str) -> int:
    """``2.5GB``, ``800MiB`` or a plain number as bytes. Raises :class:`BadInput`."""
    match = re.fullmatch(r"\s*([0-9]{0,18}\.?[0-9]{1,18})\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise BadInput(f"--max-bytes: {text!r} is no size; write 2.5GB, 800MB, 1GiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2]])
