"""The linear sum assignment problem, solved by an auction (Bertsekas, 1988): all bidders without an object bid at once,
which suits tensors better than the Hungarian method's one row at a time."""

from __future__ import annotations

import torch
from torch import Tensor

_FIRST, _NARROWING = 0.25, 0.2  # the first least raise, as a share of the range of gains, and what it is multiplied by


def assign(gains: Tensor, tolerance: float = 1e-3) -> Tensor:
    """Give each of n bidders one of n objects so that the sum of gains is the largest: (n,) int64, the object of each.

    gains: (n, n) floating point, of bidder and object. tolerance: the mean gain is at most this share of the gains' range
    below the best. Raises ValueError for gains that are not finite.
    """
    if not bool(gains.isfinite().all()):
        raise ValueError("cannot assign by gains that are not finite")
    gains = gains.double()  # a raise must not get lost beside high prices
    prices, width = gains.new_zeros(len(gains)), float(gains.max() - gains.min())
    owned = torch.arange(len(gains), device=gains.device)
    if len(gains) == 1 or not width:
        return owned
    raises, last = [_FIRST], min(tolerance, _FIRST)
    while raises[-1] > last:
        raises.append(max(raises[-1] * _NARROWING, last))
    for least in raises:  # the prices of a coarse auction make the next one short
        owned = _auction(gains, prices, least * width)
    return owned


def _auction(gains: Tensor, prices: Tensor, least: float) -> Tensor:
    """Let bidders outbid each other, by at least ``least``, until each has one object. Prices (n,) rise in place."""
    owned = torch.full_like(prices, -1, dtype=torch.int64)
    owner = owned.clone()
    while len(bidders := (owned < 0).nonzero().squeeze(1)):
        values, objects = (gains[bidders] - prices).topk(2)
        wanted = objects[:, 0]
        bids = prices[wanted] + values[:, 0] - values[:, 1] + least
        highest = torch.full_like(prices, -torch.inf).scatter_reduce_(0, wanted, bids, "amax")
        wins = bids == highest[wanted]
        winner = torch.full_like(owner, -1).scatter_(0, wanted[wins], bidders[wins])  # of equal bids any one
        sold = (winner >= 0).nonzero().squeeze(1)
        outbid = owner[sold]
        owned[outbid[outbid >= 0]] = -1
        owned[winner[sold]], owner[sold], prices[sold] = sold, winner[sold], highest[sold]
    return owned
