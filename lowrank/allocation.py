"""Allocation: the rank of every layer where they are not all cut alike, from one budget of parameters for all of them.

Every rule gives each rank of each layer a priority, and ranks are taken in the order of their priorities until the budget
is spent: one sort. A layer whose factors would be no smaller than its matrix keeps the matrix, which is then what it costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import log
from typing import NamedTuple

import numpy as np

from compress.budget import fill

_LEAST_KEPT = 0.02  # of a matrix, where the types' rule would remove it all
_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_LEAST_LOGARITHM = 3.0  # of a loss: see by_type
_NOTHING = 1e-12  # of a layer's energy


class Layer(NamedTuple):
    """A layer to be given a rank. shape: (out, in). spectrum: its squared singular values, falling, in the method's metric.
    type: layers of one type compete with each other alone under :func:`by_type`. ranks, effects: some ranks, rising, and how
    much the block's outputs change with each of them.
    """

    shape: tuple[int, int]
    spectrum: np.ndarray
    type: str = ""
    ranks: Sequence[int] = ()
    effects: Sequence[float] = ()

    @property
    def size(self) -> int:
        """Parameters of the matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def tails(self) -> np.ndarray:
        """The share of the energy that is lost with the ranks from 0 to all of them."""
        tails = np.concatenate([self.spectrum[::-1].cumsum()[::-1], [0.0]])
        return tails / tails[0] if tails[0] > 0 else tails


def ranks_that_save(n_outputs: int, n_inputs: int, round_to: int = 1) -> range:
    """The ranks whose factors hold fewer parameters than an (out, in) matrix: multiples of ``round_to``, or every one where
    not even ``round_to`` is among them."""
    most = (n_outputs * n_inputs - 1) // (n_outputs + n_inputs)
    step = round_to if round_to <= most else 1
    return range(step, most + 1, step)


def least_size(shape: Sequence[int], round_to: int = 1) -> int:
    """Parameters that an (out, in) matrix has at least, as factors or whole."""
    ranks = ranks_that_save(shape[0], shape[1], round_to)
    return ranks[0] * (shape[0] + shape[1]) if ranks else shape[0] * shape[1]


def by_energy(layers: Sequence[Layer], budget: int, round_to: int = 1) -> list[int | None]:
    """The ranks that hold one share of every layer's energy, the same for all layers and as large as the budget allows.

    Of all rules: (out, in) layers to ranks, None for a matrix that stays whole; budget: parameters in all. Raises ValueError
    where the budget is too small for the least ranks.
    """
    return _by_priority(layers, [layer.tails[:-1] for layer in layers], budget, round_to)


def by_threshold(layers: Sequence[Layer], budget: int, round_to: int = 1) -> list[int | None]:
    """WeLore's rule: the ranks whose singular values, brought to the range from 0 to 1, reach one threshold for all layers. A
    layer that would lose less than half of its ranks stays whole."""
    priorities = []
    for layer in layers:
        values = np.sqrt(layer.spectrum)
        priorities.append((values - values[-1]) / max(values[0] - values[-1], np.finfo(float).tiny))
    return _by_priority(layers, priorities, budget, round_to, lambda layer: min(layer.shape) // 2)


def by_type(layers: Sequence[Layer], budget: int, round_to: int = 1) -> list[int | None]:
    """SVD-LLM v2's rule: of each type's layers the share removed goes as 1 / log(loss), its mean being the same for all types.

    The loss is the root of the energy that a layer would lose if all were cut alike: the norm of what changes in its outputs on
    all calibration tokens, as published. Its logarithm depends on that unit, and may be zero or negative: where the least of a
    type is below 3, a choice of ours, the unit is smaller, so that it is 3.

    An absolute loss is no importance: in the first blocks outputs are small, and so is what they are added to. There the rule
    takes most, and does worse than one ratio for all on some models.
    """
    ratio = budget / sum(layer.size for layer in layers)
    kept = np.empty(len(layers))
    for kind in {layer.type for layer in layers}:
        members = [index for index, layer in enumerate(layers) if layer.type == kind]
        losses = [_loss_at(layers[index], ratio) for index in members]
        least = min((loss for loss in losses if loss > 0), default=1.0)
        level = max(log(least), _LEAST_LOGARITHM)
        weights = np.array([1 / (level + log(max(loss / least, 1))) for loss in losses])
        sizes = np.array([layers[index].size for index in members])
        kept[members] = 1 - (1 - ratio) * weights * sizes.sum() / (weights * sizes).sum()
    wanted = [max(share, _LEAST_KEPT) * layer.size / sum(layer.shape) for share, layer in zip(kept, layers, strict=True)]
    priorities = [share / np.arange(1, min(layer.shape) + 1) for share, layer in zip(wanted, layers, strict=True)]
    return _by_priority(layers, priorities, budget, round_to)


def _loss_at(layer: Layer, ratio: float) -> float:
    rank = min(int(ratio * layer.size / sum(layer.shape)), min(layer.shape))
    return float(np.sqrt(layer.spectrum[rank:].sum()))


def by_loss(layers: Sequence[Layer], budget: int, round_to: int = 1) -> list[int | None]:
    """The least sum of the changes of the blocks' outputs, of which each layer's goes as the energy that it loses (of its own
    outputs, for whitened spectra), and is known at one rank.

    Without that measurement the energies of different layers do not compare: the least sum of their shares alone made worse
    models than one ratio for all.
    """
    losses = []
    for layer in layers:
        tails, rank = layer.tails, layer.ranks[0] if layer.ranks else 0
        losses.append(tails * (layer.effects[0] / tails[rank]) if layer.ranks and tails[rank] > _NOTHING else tails)
    return least_loss([layer.shape for layer in layers], losses, budget, round_to)


def by_sensitivity(layers: Sequence[Layer], budget: int, round_to: int = 1) -> list[int | None]:
    """The least sum of the changes of the blocks' outputs, as measured at some ranks and interpolated between them."""
    losses = [_interpolated(layer.ranks, layer.effects) for layer in layers]
    return least_loss([layer.shape for layer in layers], losses, budget, round_to)


def least_loss(
    shapes: Sequence[tuple[int, int]], losses: Sequence[np.ndarray], budget: int, round_to: int = 1
) -> list[int | None]:
    """The ranks of least total loss. losses: of every layer with the ranks 0, 1, ...; falling and convex; a whole matrix loses
    nothing.

    For layers that stay factors one sort is exact, to the rank at which the budget ends. Wholes break the convexity: they are
    tried one after the other, the layer first for which being whole pays at the highest price, and kept where the total falls.
    """
    options = [ranks_that_save(*shape, round_to) for shape in shapes]
    sizes = [m * n for m, n in shapes]
    whole = {index for index, ranks in enumerate(options) if not ranks}

    def solve() -> tuple[float, list[int | None]]:
        left = budget - sum(sizes[index] for index in whole)
        found: list[int | None] = [None] * len(shapes)
        factored = [index for index in range(len(shapes)) if index not in whole]
        costs = [np.full(len(options[i]), options[i].step * sum(shapes[i])) for i in factored]
        gains = [-np.diff(losses[i][[0, *options[i]]]) / options[i].step / sum(shapes[i]) for i in factored]
        for index, count in zip(factored, fill(costs, gains, left), strict=True):
            found[index] = options[index][count - 1]
        return float(sum(losses[i][found[i]] for i in factored)), found

    best = solve()
    for index in sorted(set(range(len(shapes))) - whole, key=lambda i: -_price_of_whole(shapes[i], options[i], losses[i])):
        whole.add(index)
        try:
            found = solve()
        except ValueError:
            found = best
        if found[0] < best[0]:
            best = found
        else:
            whole.remove(index)
    return best[1]


def probed_ranks(n_outputs: int, n_inputs: int, round_to: int = 1, shares: Sequence[float] = _SHARES) -> list[int]:
    """The ranks of an (out, in) matrix, rising, whose factors hold about those shares of what factors that save may hold."""
    ranks = ranks_that_save(n_outputs, n_inputs, round_to)
    return sorted({ranks[int(share * (len(ranks) - 1))] for share in shares}) if ranks else []


def _interpolated(ranks: Sequence[int], effects: Sequence[float]) -> np.ndarray:
    """Falling and convex losses of the ranks 0, 1, ... up to the largest measured: on the lower hull of those measured. Below
    the least rank it is that of the least."""
    if not ranks:
        return np.zeros(1)
    falling = np.minimum.accumulate(np.array(effects))  # more than that of a smaller rank is noise
    hull: list[int] = []
    for index in range(len(ranks)):
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], index, ranks, falling):
            hull.pop()
        hull.append(index)
    return np.interp(np.arange(ranks[-1] + 1), [ranks[index] for index in hull], falling[hull])


def _is_above(first: int, middle: int, last: int, x: Sequence[int], y: np.ndarray) -> bool:
    """Whether the middle point is on or above the line through the other two."""
    return (y[middle] - y[first]) * (x[last] - x[first]) >= (y[last] - y[first]) * (x[middle] - x[first])


def _price_of_whole(shape: tuple[int, int], ranks: range, losses: np.ndarray) -> float:
    """Below which price per parameter a layer is better left whole than given any rank."""
    spared = shape[0] * shape[1] - np.array(ranks) * sum(shape)
    return float((losses[list(ranks)] / spared).min())


def _by_priority(
    layers: Sequence[Layer], priorities: Iterable[np.ndarray], budget: int, round_to: int,
    most: Callable[[Layer], int] = lambda layer: layer.size,
) -> list[int | None]:  # fmt: skip
    """Take ranks in the order of their priorities (of each layer's ranks, falling); most: the largest rank that a layer is given
    before it stays whole."""
    options, costs, ranked = [], [], []
    for layer, priority in zip(layers, priorities, strict=True):
        ranks = ranks_that_save(*layer.shape, round_to)
        ranks = [rank for rank in ranks if rank <= most(layer)] or list(ranks[:1])
        options.append(ranks)
        costs.append(np.diff([0, *(rank * sum(layer.shape) for rank in ranks), layer.size]))
        ranked.append(priority[[0, *ranks]])
    taken = fill(costs, ranked, budget)
    return [ranks[count - 1] if count <= len(ranks) else None for ranks, count in zip(options, taken, strict=True)]


RULES: dict[str, Callable[[Sequence[Layer], int, int], list[int | None]]] = {
    "energy": by_energy, "loss": by_loss, "type": by_type, "threshold": by_threshold, "sensitivity": by_sensitivity,
}  # fmt: skip
