"""Codes of a few bits as one stream of bytes; the inverse is in ``stored_layers.py``, which artifacts carry with them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes (any shape, int8, in [-2**(bits-1), 2**(bits-1) - 1]) into uint8, least significant bit first.

    Eight codes take ``bits`` bytes, so nothing but the end of the stream is padded. Meta tensors give meta tensors.
    """
    if codes.is_meta:
        return torch.empty(-(-codes.numel() * bits // 8), dtype=torch.uint8, device="meta")
    unsigned = codes.flatten().to(torch.int16) + 2 ** (bits - 1)
    n_bytes = -(-len(unsigned) * bits // 8)
    octets = pad(unsigned, (0, -len(unsigned) % 8)).view(-1, 8)
    shifts = torch.arange(bits, dtype=torch.int16, device=codes.device)
    planes = (octets.unsqueeze(-1) >> shifts) & 1  # (n, 8, bits): the bits in order
    weights = 1 << torch.arange(8, dtype=torch.int16, device=codes.device)
    return (planes.reshape(-1, 8) * weights).sum(1).to(torch.uint8)[:n_bytes]


def pack_indices(indices: Tensor, bits: int) -> Tensor:
    """Pack indices (any shape, integers in [0, 2**bits)) into uint8, least significant bit first, as :func:`pack_bits` does."""
    if indices.is_meta:
        return torch.empty(-(-indices.numel() * bits // 8), dtype=torch.uint8, device="meta")
    planes = (indices.flatten().unsqueeze(1) >> torch.arange(bits, device=indices.device)) & 1
    stream = pad(planes.to(torch.uint8).flatten(), (0, -indices.numel() * bits % 8)).view(-1, 8)
    return (stream << torch.arange(8, dtype=torch.uint8, device=indices.device)).sum(1).to(torch.uint8)
