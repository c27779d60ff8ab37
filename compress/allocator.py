"""What the C library does with memory that was freed."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_LARGE = 8 << 20


def give_back_large_blocks() -> None:
    """Have glibc return blocks of 8 MiB and more to the system as soon as they are freed, as it does with those of 32 MiB anyway.

    By itself it keeps what lies between in its heap, where small blocks settle in the gaps: logits that are computed chunk by
    chunk then take several times the memory of all of them at once. Another C library is left alone.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
