"""Text that the models write while one of them is trained on it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.train_pass import Batch

LOG_CHANCES = "log_chances"
"""Among a batch's extras: of every written token the log-probability under what it was drawn from, (n, length) float32."""


class Rollouts(NamedTuple):
    """The models of a training run, as writers.

    seed: of the run; what is drawn follows from it, the step's index and the batch. memory: what a pass keeps from step to
    step, by name; saved with the run's state, so that an interrupted run remembers. gather: tensors (n, ...) of this process
    -> those of all, (processes * n, ...), in the same order everywhere: for memories that are to be the same in all.
    held_out: (steps done, loss) on text that is not trained on, as far as it was measured.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel | None
    seed: int
    memory: dict[str, Tensor]
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor
    held_out: Sequence[tuple[int, float]] = ()

    def chance(self, index: int) -> float:
        """A number drawn between 0 and 1 for the step of that index: of all parts and processes the same."""
        return float(torch.rand((), generator=torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {index}".encode()))))

    def generator(self, tokens: Tensor, index: int) -> torch.Generator:
        """For what is drawn for these tokens: no two parts of a step draw the same."""
        digest = zlib.crc32(tokens.cpu().numpy().tobytes(), zlib.crc32(f"{self.seed} {index}".encode()))
        return torch.Generator(tokens.device).manual_seed(digest)  # of which a CPU's uses no more than these 32 bits

    def rewrite(
        self, batch: Batch, prompt: float, *, temperature: float = 1.0, teacher: float = 0.0, greedy: Tensor | None = None
    ) -> Batch:
        """Let the models write on from prompts.

        prompt: share of each sequence that is given; where a batch says which tokens count, all others are given instead. Only
        what is written counts in the result, whose extras hold ``LOG_CHANCES``.
        temperature: divides the logits. teacher: its share of the distribution that tokens are drawn from; 1: it writes alone.
        greedy: (n,) int64, so many of the first tokens that are written in each sequence are the likeliest; None: all are drawn.
        """
        if batch.counted is None:
            n_given = max(1, int(prompt * batch.tokens.shape[1]))
            written = torch.ones_like(batch.tokens, dtype=torch.bool)
        else:
            n_given, written = 1, batch.counted.clone()
        written[:, :n_given] = False
        if greedy is None:
            greedy = batch.tokens.new_zeros(len(batch.tokens))
        tokens, chances = self._write(batch, written, temperature, teacher, greedy)
        return batch._replace(tokens=tokens, counted=written, extras={**batch.extras, LOG_CHANCES: chances})

    @torch.no_grad()
    def _write(self, batch: Batch, written: Tensor, temperature: float, share: float, greedy: Tensor) -> tuple[Tensor, Tensor]:
        """The batch's tokens with those drawn anew that are to be written, (n, length) bool, and their log-probabilities."""
        tokens, chances = batch.tokens.clone(), torch.zeros(batch.tokens.shape, device=batch.tokens.device)
        generator, columns = self.generator(batch.tokens, batch.index), written.any(0).nonzero().flatten().tolist()
        writers = [(model, part) for model, part in ((self.student, 1 - share), (self.teacher, share)) if part and model]
        caches: list = [None] * len(writers)
        vocabulary = min(model.config.get_text_config().vocab_size for model in (self.student, self.teacher) if model)
        seen = 0
        for column in range(columns[0], columns[-1] + 1) if columns else ():
            mixture = torch.zeros((), device=tokens.device)
            for number, (model, part) in enumerate(writers):
                output = model(input_ids=tokens[:, seen:column], past_key_values=caches[number], use_cache=True, logits_to_keep=1)
                caches[number] = output.past_key_values
                logits = output.logits[:, -1, :vocabulary].float() / temperature
                mixture = mixture + part * logits.softmax(-1)
            drawn, where = torch.multinomial(mixture, 1, generator=generator), written[:, column]
            is_greedy = written[:, :column].sum(1) < greedy
            drawn = torch.where(is_greedy.unsqueeze(1), mixture.argmax(-1, keepdim=True), drawn)
            tokens[where, column] = drawn[where, 0]
            chances[where, column] = mixture.gather(1, drawn)[where, 0].log()
            seen = column
        return tokens, chances
