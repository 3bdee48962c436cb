"""Examples end to end in one row, each attending to itself only.

mlx-lm's models ask their cache for the attention mask. A cache that stores nothing and answers with a mask
of segments is all it takes: the models run unchanged.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class SegmentMask:
    """Which keys a query may see in rows of several examples, kept as numbers instead of T² booleans."""

    segments_BT: mx.array
    """The example of each position; -1 behind the last."""
    window: int | None = None
    """How many positions back a query sees, itself included; None: to the row's begin."""

    def dense(self) -> mx.array:
        """The same as a boolean array, (B, 1, T, T)."""
        return self.block(0, self.segments_BT.shape[1], 0)

    def first_key(self, start: int) -> int:
        """The first key that any query from `start` on may see."""
        return 0 if self.window is None else max(0, start - self.window + 1)

    def block(self, start: int, stop: int, first: int) -> mx.array:
        """Whether queries start:stop see keys first:stop, (B, 1, stop - start, stop - first)."""
        queries, keys = self.segments_BT[:, start:stop], self.segments_BT[:, first:stop]
        same = queries[:, :, None] == keys[:, None, :]
        return (same & band(start, stop, first, self.window))[:, None]


def band(start: int, stop: int, first: int, window: int | None) -> mx.array:
    """Whether queries start:stop see keys first:stop when only order and distance count."""
    queries, keys = mx.arange(start, stop)[:, None], mx.arange(first, stop)
    seen = queries >= keys
    return seen if window is None else seen & (queries < keys + window)


class RowCache:
    """Stands in for a key-value cache: keeps nothing, knows which positions belong together.

    Args:
        segments_BT: The example each position belongs to; -1 behind the last.
        longest: No example has more positions; narrows what attention looks at and changes no number.
        is_dense: Answer with arrays, which any attention takes, instead of a `SegmentMask`.
    """

    offset = 0

    def __init__(self, segments_BT: mx.array, *, longest: int | None = None, is_dense: bool = True) -> None:
        self.segments_BT, self.longest, self.is_dense = segments_BT, longest, is_dense
        self._masks: dict[int | None, SegmentMask | mx.array] = {}

    def make_mask(
        self,
        N: int,  # noqa: ARG002  # the row's own length
        return_array: bool = False,
        window_size: int | None = None,
    ) -> SegmentMask | mx.array:
        """Who attends to whom: earlier positions of the same example, within the window."""
        if window_size not in self._masks:
            mask = SegmentMask(self.segments_BT, min(filter(None, (window_size, self.longest)), default=None))
            self._masks[window_size] = mask.dense() if self.is_dense or return_array else mask
        return self._masks[window_size]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The keys and values of this row are all there are."""
        return keys, values


def keeps_examples_apart(model: nn.Module, *, num_rows: int = 1) -> bool:
    """Whether a model gives examples in one row the logits it gives each alone, in so many such rows.

    Tried on a few tokens: rotary positions pass, since only distances count; learned absolute positions
    do not, nor do models that carry a state along the row. gemma2 takes one such row, but no two: its own
    attention reads the mask's rows as heads.
    """
    examples = [[1, 2, 3], [5, 4, 3, 2]]
    rows = [examples[:: -1 if row % 2 else 1] for row in range(num_rows)]  # no two neighbours alike
    segments = mx.array([[number for number, tokens in enumerate(row) for _ in tokens] for row in rows])
    try:
        tokens = mx.array([[token for example in row for token in example] for row in rows])
        together = model(tokens, cache=[RowCache(segments)] * len(model.layers))
        alone = mx.concatenate(
            [mx.concatenate([model(mx.array([tokens])) for tokens in row], axis=1) for row in rows]
        )
        difference = mx.abs((together - alone).astype(mx.float32)).max()
        # Half-precision rounding stays far below this; a wrong position or a leak far above.
        spread = alone.astype(mx.float32).std()
        return bool((difference < 0.05 * spread).item())
    except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError):
        return False
