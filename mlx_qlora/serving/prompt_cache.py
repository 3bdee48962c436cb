"""Keys and values of recent prompts, so that a shared beginning is computed once."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

DEFAULT_PROMPT_CACHE_BYTES = 256 * 1024**2
MIN_SHARED_TOKENS = 8
"""A shorter beginning, as a template's first tokens, is not worth keeping or copying."""


@dataclass(frozen=True)
class _Entry:
    adapter: int
    tokens: np.ndarray
    caches: list[Any]
    num_bytes: int
    can_trim: bool


class PromptCache:
    """The caches of the texts used last, at most so many bytes of them.

    An adapter on keys and values changes them, so each adapter has texts of its own. Caches that cannot be
    trimmed (a window that has gone round, a recurrent state) serve a prompt only as a whole.

    Args:
        max_bytes: Of keys and values; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._next = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, adapter: int, tokens: Sequence[int]) -> tuple[list[int], list[Any]] | None:
        """The longest known beginning of a prompt, never all of it, and caches that hold just that.

        The caches share their arrays with what is kept here, and are to be merged, not written to.
        """
        wanted = np.asarray(tokens, np.int64)
        best, best_key = MIN_SHARED_TOKENS - 1, -1
        for key, entry in self._entries.items():
            usable = self._usable(entry, wanted) if entry.adapter == adapter else 0
            if usable > best:
                best, best_key = usable, key
        if best_key < 0:
            return None
        entry = self._entries[best_key]
        self._entries.move_to_end(best_key)
        caches = copy.deepcopy(entry.caches)  # new cache objects over the same arrays
        if best < len(entry.tokens):
            trim_prompt_cache(caches, len(entry.tokens) - best)
        return list(tokens[:best]), caches

    def keep(self, adapter: int, tokens: Sequence[int], caches: list[Any]) -> None:
        """Remember the caches that hold these tokens, and forget the oldest until all fit."""
        held = np.asarray(tokens, np.int64)
        arrays = [
            array for _, array in tree_flatten([c.state for c in caches]) if isinstance(array, mx.array)
        ]
        mx.eval(arrays)  # a lazy slice would keep the whole batch's arrays
        num_bytes = sum(array.nbytes for array in arrays)
        if num_bytes > self.max_bytes or len(held) < MIN_SHARED_TOKENS:
            return
        entry = _Entry(adapter, held, caches, num_bytes, can_trim_prompt_cache(caches))
        for key in [key for key, old in self._entries.items() if _is_covered(old, entry)]:
            self._forget(key)
        self._entries[self._next] = entry
        self._next += 1
        self.num_bytes += num_bytes
        while self.num_bytes > self.max_bytes:
            self._forget(next(iter(self._entries)))

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self.num_bytes = 0

    def _forget(self, key: int) -> None:
        self.num_bytes -= self._entries.pop(key).num_bytes

    @staticmethod
    def _usable(entry: _Entry, wanted: np.ndarray) -> int:
        """Tokens of a prompt that an entry can serve; one is left, for its logits are needed."""
        shared = _common(entry.tokens, wanted[:-1])
        return shared if entry.can_trim or shared == len(entry.tokens) else 0


def _common(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens two texts begin with alike."""
    size = min(len(first), len(second))
    differs = np.flatnonzero(first[:size] != second[:size])
    return int(differs[0]) if differs.size else size


def _is_covered(old: _Entry, new: _Entry) -> bool:
    """Whether a new entry serves whatever an old one does."""
    is_prefix = len(old.tokens) <= len(new.tokens) and _common(old.tokens, new.tokens) == len(old.tokens)
    is_same = is_prefix and len(old.tokens) == len(new.tokens)
    return old.adapter == new.adapter and (is_same or (is_prefix and new.can_trim))
