"""The next token's loss, of the tokens that count."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from compress.distill.fine_tune import FineTune
from compress.passes import Taxon


def test_the_loss_is_that_of_the_next_token_without_a_teacher(batch, make_signal):
    student = make_signal(1)
    expected = F.cross_entropy(student.head(student.hidden), batch.tokens[:, 1:][batch.counted[:, 1:]])
    torch.testing.assert_close(FineTune(chunk=5).loss(student, None, batch), expected)
    assert not FineTune.needs.teacher and FineTune.taxon is Taxon.BLACK_BOX
