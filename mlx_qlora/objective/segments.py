"""Examples end to end in one row, each attending to itself only.

mlx-lm's models ask their cache for the attention mask. A cache that stores nothing and answers with a mask
of segments is all it takes: the models run unchanged.

Shapes: B rows, T positions.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class RowCache:
    """Stands in for a key-value cache: keeps nothing, knows which positions belong together.

    Args:
        segments_BT: The example each position belongs to; -1 behind the last.
    """

    offset = 0

    def __init__(self, segments_BT: mx.array) -> None:
        self.segments_BT = segments_BT
        self._masks: dict[int | None, mx.array] = {}

    def make_mask(
        self,
        N: int,
        return_array: bool = False,  # noqa: ARG002  # the answer always is an array
        window_size: int | None = None,
    ) -> mx.array:
        """Who attends to whom, (B, 1, T, T): earlier positions of the same example, within the window."""
        if window_size not in self._masks:
            positions = mx.arange(N)
            distance = positions[:, None] - positions[None]
            allowed = distance >= 0
            if window_size is not None:
                allowed = allowed & (distance < window_size)
            same = self.segments_BT[:, None, :, None] == self.segments_BT[:, None, None, :]
            self._masks[window_size] = same & allowed
        return self._masks[window_size]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The keys and values of this row are all there are."""
        return keys, values


def keeps_examples_apart(model: nn.Module) -> bool:
    """Whether a model gives examples in one row the logits it gives each alone.

    Tried on a few tokens: rotary positions pass, since only distances count; learned absolute positions
    do not, nor do models that carry a state along the row.
    """
    examples = [[1, 2, 3], [5, 4, 3, 2]]
    segments = mx.array([[0] * 3 + [1] * 4])
    try:
        together = model(
            mx.array([examples[0] + examples[1]]), cache=[RowCache(segments)] * len(model.layers)
        )
        alone = mx.concatenate([model(mx.array([tokens])) for tokens in examples], axis=1)
        difference = mx.abs((together - alone).astype(mx.float32)).max()
        # Half-precision rounding stays far below this; a wrong position or a leak far above.
        spread = alone.astype(mx.float32).std()
        return bool((difference < 0.05 * spread).item())
    except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError):
        return False
