"""MLX's memory limits, set for a while and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import mlx.core as mx

CACHE_SHARE = 8
"""Freed buffers that are kept take at most the budget over this, when nothing else is said."""


@contextmanager
def memory_limits(budget_bytes: int | None, cache_bytes: int | None = None) -> Iterator[None]:
    """Lower MLX's memory and cache limits while the context is open; the ones before come back after it.

    The memory limit caps nothing: over it MLX frees its cache and waits for work under way before it
    starts more. A limit that is already lower stays, since MLX's own default knows the device.

    The wired limit is left alone, always. mlx-lm raises it to the maximum and does not put it back;
    memory wired that way cannot be swapped or compressed, and on small Macs that has been linked to
    kernel panics.

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
        yield
