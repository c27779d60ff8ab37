"""Apply a pass to a weight in any representation: factor by factor, part by part, masks kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from compress.errors import BadInput, CompressError
from compress.passes import CorrectionPass, LinearPass, StoragePass, StreamPass
from compress.skeleton import Skeleton
from compress.stats import LinearStats
from compress.weights import Coded, Composed, Dense, Incoherent, LowRank, Masked, SparsePart, Sum, TensorTrain, Weight, opened
from compress.weights.composed import unmasked
from compress.weights.matrix import counted


def apply(step: StreamPass, weight: Weight, stats: LinearStats, original: Tensor | None = None) -> Weight:
    """Apply one linear pass.

    A pass that does not factorise is applied to each factor of a low-rank weight and each core of a tensor train, with the
    statistics carried through those before it as compressed, to those parts of a sum that are matrices of their own, and to
    a matrix in the basis in which it is kept, unless the pass chooses a basis itself. An earlier mask is given to the pass
    and holds in its result. A matrix that is stored by a bitmask is given to every pass, and left, as a masked one: its mask
    or grid may change, and with it what storing takes. original: (out, in), the layer when the
    stage began.
    """
    weight = opened(weight)
    if isinstance(step, CorrectionPass):
        if original is None:
            raise CompressError(f"{step.method()} has no uncorrected layer to go by")
        return step.correct(original, weight, stats.only(step.needs.stats))
    assert isinstance(step, LinearPass)
    if not step.factorises and isinstance(weight, LowRank):
        down = apply(step, weight.down, stats)
        through = stats.through(down.dense(torch.float32)) if step.needs.stats else stats
        return LowRank(down, apply(step, weight.up, through))
    if not step.factorises and isinstance(weight, TensorTrain):
        return weight.each_core(lambda core, entering: apply(step, core, entering), stats if step.needs.stats else None)
    if not step.factorises and isinstance(weight, Sum):
        return Sum(tuple(apply(step, part, stats) if _is_matrix(part) else part for part in weight.parts))
    if not step.factorises and isinstance(weight, Incoherent):
        inner = apply(step, weight.inner, weight.carry(stats) if step.needs.stats else stats)
        if not isinstance(inner, Incoherent):
            return weight.around(inner)
    if isinstance(step, StoragePass):
        return step.store(weight)
    result = step.linear(weight.dense(), stats.only(step.needs.stats), weight.mask)
    return _settle(step, weight, result)


def outline(step: StreamPass, weight: Weight) -> Weight:
    """What :func:`apply` would give for a weight of meta tensors."""
    weight = opened(weight)
    if isinstance(step, CorrectionPass):
        return step.correct(torch.empty(weight.shape, dtype=weight.dtype, device="meta"), weight, _no_stats(weight))
    factorises = isinstance(step, LinearPass) and step.factorises
    if not factorises and isinstance(weight, LowRank):
        return LowRank(outline(step, weight.down), outline(step, weight.up))
    if not factorises and isinstance(weight, TensorTrain):
        weight.check_cores(step.needs.stats)
        return weight.each_core(lambda core, _: outline(step, core), None)
    if not factorises and isinstance(weight, Sum):
        return Sum(tuple(outline(step, part) if _is_matrix(part) else part for part in weight.parts))
    if not factorises and isinstance(weight, Incoherent):
        inner = outline(step, weight.inner)
        if not isinstance(inner, Incoherent):
            return weight.around(inner)
    if isinstance(step, StoragePass):
        return step.store(weight)
    result = step.outline(weight.dense(), _no_stats(weight), weight.mask)
    return counted(_settle(step, weight, result), weight, result)


def outlines(
    skeleton: Skeleton, passes: Sequence[StreamPass], chosen: Mapping[StreamPass, Mapping[str, LinearPass]] = {}
) -> Iterator[tuple[str, Weight]]:
    """(name, what it will become), of meta tensors, for every layer. chosen: for passes that survey the model, what they
    allot to each layer.

    Raises :class:`BadInput` where a pass cannot take a layer.
    """
    for name in skeleton.linear_names():
        index, _, local = name.removeprefix(f"{skeleton.arch.blocks}.").partition(".")
        weight = skeleton.read_weight(int(index), local, meta=True)
        for step in (step for step in passes if step.matches(name)):
            try:
                weight = outline(chosen[step][name] if step in chosen else step, weight)
            except ValueError as error:
                raise BadInput(f"{step.label()} at {name}: {error}") from None
        yield name, weight


def _no_stats(weight: Weight) -> LinearStats:
    return LinearStats(weight.shape[1], (), "meta")


def _is_matrix(part: Weight) -> bool:
    return not isinstance(unmasked(part), SparsePart)


def _settle(step: StreamPass, weight: Weight, result: Weight) -> Weight:
    """Keep of the earlier weight what a pass promises to keep."""
    if isinstance(step, LinearPass) and step.factorises:
        if isinstance(result, Composed):
            return result if not isinstance(weight, LowRank) or result.numel < weight.numel else weight
        return weight
    inner = unmasked(weight)
    if isinstance(result, Masked) and isinstance(result.inner, Dense) and not isinstance(inner, Dense):
        return weight.masked(result.kept)  # pruning a grid keeps it
    if isinstance(result, Dense) and isinstance(inner, Coded):
        return weight
    if weight.mask is not None and result.mask is None:
        return result.masked(weight.mask)
    return result
