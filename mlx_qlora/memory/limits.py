"""MLX's memory limits, set for a while and put back."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import mlx.core as mx

CACHE_SHARE = 8
"""Freed buffers that are kept take at most the budget over this, when nothing else is said."""

TIGHT_SHARE = 0.5
"""Where what is held already takes more of the budget, freed memory goes back to the system at once."""

_M_MMAP_THRESHOLD = -3
_MAPPED_FROM_BYTES, _USUAL_BYTES = 1024**2, 32 * 1024**2
"""glibc's malloc.h; the second is where its own moving threshold ends (DEFAULT_MMAP_THRESHOLD_MAX)."""


@contextmanager
def memory_limits(budget_bytes: int | None, cache_bytes: int | None = None) -> Iterator[None]:
    """Lower MLX's memory and cache limits while the context is open; the ones before come back after it.

    The memory limit caps nothing: over it MLX frees its cache and waits for work under way before it
    starts more. A limit that is already lower stays, since MLX's own default knows the device.

    The wired limit is left alone, always. mlx-lm raises it to the maximum and does not put it back;
    memory wired that way cannot be swapped or compressed, and on small Macs that has been linked to
    kernel panics.

    On Linux, when memory is tight, arrays over 1 MiB get pages of their own, which go back to the system when
    the array does. Otherwise the C library keeps them, and holes between them are lost: a seventh of a 7B
    model's footprint, but half as much time again.

    Args:
        budget_bytes: What arrays may take; None leaves the memory limit as it is.
        cache_bytes: What freed buffers may take; None is an eighth of the budget, or no change without one.
    """
    if cache_bytes is None and budget_bytes is not None:
        cache_bytes = budget_bytes // CACHE_SHARE
    with ExitStack() as restore:
        for set_limit, limit in ((mx.set_memory_limit, budget_bytes), (mx.set_cache_limit, cache_bytes)):
            if limit is not None:
                before = set_limit(limit)
                restore.callback(set_limit, before)
                set_limit(min(limit, before))
        if budget_bytes is not None and mx.get_active_memory() > TIGHT_SHARE * budget_bytes:
            restore.callback(_map_arrays_from, _USUAL_BYTES)
            _map_arrays_from(_MAPPED_FROM_BYTES)
        yield


def _map_arrays_from(num_bytes: int) -> None:
    """Let glibc give each allocation of this size or more pages of its own; nothing elsewhere."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, num_bytes)
