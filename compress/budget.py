"""Share out a budget: one choice for each unit, the least total loss, never more than the total cost allowed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_BINS_PER_UNIT, _LEAST_BINS = 400, 20_000


def share_out(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Index of the choice for every unit, minimising the sum of losses with a sum of costs of at most ``budget``.

    costs, losses: of each unit's choices, in any order. A multiple-choice knapsack, solved by dynamic programming over
    costs that are rounded up to a fraction of the budget: the budget is never exceeded, and the rounding hides at most a
    four-hundredth of it. Raises ValueError where even the cheapest choices cost more.
    """
    least = sum(min(unit) for unit in costs)
    if least > budget:
        raise ValueError(f"the budget of {budget:,} is below {least:,}, what the cheapest choices cost together")
    spare, n_bins = budget - least, max(_LEAST_BINS, _BINS_PER_UNIT * len(costs))
    bin_size = max(1.0, spare / n_bins)
    width = int(spare / bin_size) + 1
    best, chosen = np.zeros(width), []
    for unit_costs, unit_losses in zip(costs, losses, strict=True):
        cheapest = min(unit_costs)
        total = np.full(width, np.inf)
        choice = np.zeros(width, dtype=np.int16)
        for index, (cost, loss) in enumerate(zip(unit_costs, unit_losses, strict=True)):
            shift = int(np.ceil((cost - cheapest) / bin_size))
            if shift >= width:
                continue
            candidate = best[: width - shift] + loss
            better = candidate < total[shift:]
            total[shift:][better] = candidate[better]
            choice[shift:][better] = index
        best = total
        chosen.append((choice, cheapest))
    picked, left = [], width - 1
    for (choice, cheapest), unit_costs in zip(reversed(chosen), reversed(costs), strict=True):
        index = int(choice[left])
        picked.append(index)
        left -= int(np.ceil((unit_costs[index] - cheapest) / bin_size))
    return picked[::-1]


def fill(costs: Sequence[np.ndarray], priorities: Sequence[np.ndarray], budget: int) -> list[int]:
    """How many of its parts each unit is given, when parts are handed out in the order of falling priority, of equal ones the
    earlier unit's first, within ``budget``.

    costs, priorities: (n parts,) of each unit. Its parts come in their order, so that none has a higher priority than those
    before it; the first is given in any case. A part that no longer fits ends its unit; others go on. Raises ValueError where
    the first parts alone cost more than the budget.
    """
    least = int(sum(unit[0] for unit in costs))
    if least > budget:
        raise ValueError(f"the budget of {budget:,} is below {least:,}, what the least parts cost together")
    if not costs:
        return []
    taken, left = np.ones(len(costs), dtype=int), budget - least
    unit = np.repeat(np.arange(len(costs)), [len(parts) - 1 for parts in costs])
    cost = np.concatenate([parts[1:] for parts in costs])
    needed = np.concatenate([np.maximum.accumulate(parts[1:]) for parts in costs])  # to get as far as this part
    order = np.argsort(-np.concatenate([np.minimum.accumulate(parts[1:]) for parts in priorities]), kind="stable")
    while len(order := order[needed[order] <= left]):
        total = cost[order].cumsum()
        n_taken = int(np.searchsorted(total, left, side="right"))
        taken += np.bincount(unit[order[:n_taken]], minlength=len(costs))
        left -= int(total[n_taken - 1])
        order = order[n_taken:]
    return taken.tolist()


def slopes(costs: Sequence[float], losses: Sequence[float]) -> list[float]:
    """By how much each step from one option to the next lowers the loss per cost, falling: along the lower convex hull.

    costs: rising; losses: of the same options. One number less than these; of a step that is worth less than the one behind it
    that of both together, and at least 0.
    """
    found: list[tuple[float, float, int]] = []  # gain, cost, steps
    for step in range(1, len(costs)):
        gain, cost, count = losses[step - 1] - losses[step], costs[step] - costs[step - 1], 1
        while found and gain * found[-1][1] >= found[-1][0] * cost:
            gain, cost, count = gain + found[-1][0], cost + found[-1][1], count + found[-1][2]
            found.pop()
        found.append((gain, cost, count))
    return [max(0.0, gain / cost) for gain, cost, count in found for _ in range(count)]
