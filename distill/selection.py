"""Which training windows are worth most after compression: PASER (He et al., 2502.12594).

Windows are grouped by what they are about, the total is shared out over the groups by how much the compressed model has lost on
them, and within a group those go first on which it lost most for their length. Where this differs from the paper and its code:

- what a window is about are the *original* model's mean final hidden states, not a sentence encoder's, which would be another
  download; groups are found in the leading eigenvectors of the diffusion kernel by k-means, not by factorising them;
- the loss of a window is a mean over its tokens, where the code sums: long windows would win by their length alone;
- no graph of concepts decides which windows contradict each other: training text is not instructions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.distill.losses import jsd, per_token
from compress.signals import signal_of
from compress.train_pass import Batch

N_CLUSTERS = 10
_LANDMARKS = 2048  # windows whose kernel is decomposed; the others join the group of the nearest
_N_ROUNDS = 50  # of k-means, at most


def select(
    student: PreTrainedModel, teacher: PreTrainedModel, tokens: Tensor, counted: Tensor | None, n: int, *,
    n_clusters: int = N_CLUSTERS, batch_size: int = 8, seed: int = 0,
) -> Tensor:  # fmt: skip
    """Indices (n,) int64, ascending, of the windows to train on. tokens: (windows, length) int64; counted: the same shape, bool,
    or None (see :class:`compress.train_pass.Batch`). student: the compressed model, teacher: the original.

    Raises ValueError where there are fewer windows than ``n``.
    """
    scores, pooled, n_tokens = measure(student, teacher, tokens, counted, batch_size)
    return choose(scores, clusters(pooled, n_clusters, seed), n_tokens, n)


@torch.no_grad()
def measure(
    student: PreTrainedModel, teacher: PreTrainedModel, tokens: Tensor, counted: Tensor | None, batch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each window: the mean over its predicted tokens of the Jensen-Shannon divergence of the two models' predictions, in
    nats, 0 to ln 2; the mean of the teacher's final hidden states there, (windows, d); and how many they are."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, len(tokens), batch_size):
        rows = slice(start, start + batch_size)
        device = next(student.parameters()).device
        batch = Batch(tokens[rows].to(device), None if counted is None else counted[rows].to(device))
        ours, theirs = (signal_of(model, batch) for model in (student, teacher))
        losses, hidden = per_token(jsd, ours, theirs).double(), theirs.hidden.float()
        n_tokens = torch.bincount(batch.windows, minlength=len(batch.tokens))
        sums = losses.new_zeros(len(n_tokens)).index_add(0, batch.windows, losses)
        pooled = hidden.new_zeros(len(n_tokens), hidden.shape[1]).index_add(0, batch.windows, hidden)
        divisor = n_tokens.clamp_min(1)
        found.append(((sums / divisor).cpu(), (pooled / divisor.unsqueeze(1)).cpu(), n_tokens.cpu()))
    scores, pooled, n_tokens = (torch.cat(parts) for parts in zip(*found, strict=True))
    return scores, pooled, n_tokens


def choose(scores: Tensor, labels: Tensor, n_tokens: Tensor, n: int) -> Tensor:
    """Indices (n,) int64, ascending, of the windows to train on: of every cluster its budget, those of the highest
    :func:`efficiency` first, of equal ones the earlier. scores, labels, n_tokens: (windows,)."""
    members = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
    means = torch.stack([scores[rows].mean() for rows in members])
    counts = budgets(means, [len(rows) for rows in members], n)
    worth = efficiency(scores, n_tokens)
    ranked = [rows[worth[rows].argsort(descending=True, stable=True)] for rows in members]
    picked = [rows[:count] for rows, count in zip(ranked, counts, strict=True)]
    return torch.cat(picked).sort().values


def efficiency(scores: Tensor, n_tokens: Tensor) -> Tensor:
    """What a window's divergence is for its cost, JSD / ln(tokens**2); below two tokens it costs as two."""
    return scores / (2 * n_tokens.clamp_min(2).double().log())


def budgets(means: Tensor, sizes: list[int], total: int) -> list[int]:
    """How many windows each cluster gives: in proportion to its mean score, never more than it has, ``total`` exactly.

    What a cluster cannot give is shared out over the others by the same rule. Without any score at all they give in proportion
    to their sizes. Raises ValueError where all together have fewer.
    """
    if total > sum(sizes):
        raise ValueError(f"{total} windows are to be chosen from {sum(sizes)}")
    room = torch.tensor(sizes, dtype=torch.float64)
    weight = means.double() if bool((means > 0).any()) else room.clone()
    given = torch.zeros_like(room)
    while (left := total - float(given.sum())) > 1e-9:
        open_ = given < room
        weights = weight * open_ if bool((weight * open_ > 0).any()) else room * open_
        given = torch.minimum(room, given + left * weights / weights.sum())
    counts = (given + 1e-9).floor()
    short = total - int(counts.sum())
    remainders = torch.where(counts < room, given - counts, -torch.ones_like(room))
    counts[remainders.argsort(descending=True, stable=True)[:short]] += 1
    return [int(count) for count in counts]


def clusters(points: Tensor, n_clusters: int, seed: int) -> Tensor:
    """A label (n,) int64 for each of the points (n, d): spectral clustering with the kernel exp(-distance**2 / sigma**2), sigma
    being the median distance."""
    generator = torch.Generator().manual_seed(seed)
    landmarks = points[torch.randperm(len(points), generator=generator)[:_LANDMARKS]].double()
    n_clusters = min(n_clusters, len(landmarks))
    distances = torch.cdist(landmarks, landmarks)
    typical = distances[~torch.eye(len(landmarks), dtype=torch.bool)]
    if n_clusters < 2 or not bool((typical > 0).any()):
        return torch.zeros(len(points), dtype=torch.int64)
    sigma = typical.median() if typical.median() > 0 else typical.max()
    kernel = torch.exp(-((distances / sigma) ** 2))
    degree = kernel.sum(1).rsqrt()
    vectors = torch.linalg.eigh(degree.unsqueeze(1) * kernel * degree).eigenvectors[:, -n_clusters:]
    labels = _k_means(torch.nn.functional.normalize(vectors, dim=1), n_clusters, generator)
    nearest = [torch.cdist(rows.double(), landmarks).argmin(1) for rows in points.split(_LANDMARKS)]
    return labels[torch.cat(nearest)]


def _k_means(points: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """Labels (n,): Lloyd's rounds from k-means++'s seeds."""
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < n_clusters:
        chances = torch.cdist(points, centres).min(1).values.square()
        if float(chances.sum()) < 1e-12 or not math.isfinite(float(chances.sum())):
            break
        centres = torch.cat([centres, points[torch.multinomial(chances, 1, generator=generator)]])
    labels = torch.cdist(points, centres).argmin(1)
    for _ in range(_N_ROUNDS):
        centres = torch.stack([points[labels == k].mean(0) if bool((labels == k).any()) else c for k, c in enumerate(centres)])
        before, labels = labels, torch.cdist(points, centres).argmin(1)
        if labels.equal(before):
            break
    return labels
