"""Several examples in one row: none of a batch's work is padding.

An example attends to itself only: the row carries, for each position, the number of its example. Under
rotary positions an example may begin anywhere, since only distances count.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlx_qlora.dataset.records import Example

PADDING = -1
"""The segment number of positions behind the last example."""


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into as few bins as best-fit-decreasing finds; each bin lists its items' indices.

    An item longer than `capacity` gets a bin of its own.

    Source: Johnson et al. 1974, "Worst-case performance bounds for simple one-dimensional packing
    algorithms": at most 11/9 of the optimum, and one.
    """
    bins: list[list[int]] = []
    rooms: dict[int, list[int]] = {}  # room left → bins that have it
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [room for room, having in rooms.items() if having and room >= lengths[item]]
        if fitting:
            index = rooms[min(fitting)].pop()
            room = min(fitting) - lengths[item]
            bins[index].append(item)
        else:
            index, room = len(bins), capacity - lengths[item]
            bins.append([item])
        rooms.setdefault(room, []).append(index)
    return bins


def padded_length(length: int) -> int:
    """The width given to a row of so many positions: few widths, so that few graphs are traced.

    Multiples of 32 up to 512, then eight widths to each doubling.
    """
    step = 32
    while length > step * 16:
        step *= 2
    return max(step, -(-length // step) * step)


def concatenated(rows: Sequence[Sequence[Example]]) -> tuple[np.ndarray, ...]:
    """inputs, targets, mask and segments of several rows, each a sequence of examples; all (B, T).

    An example of n tokens takes n − 1 positions: its last token is a target only.
    """
    width = padded_length(max(sum(len(e.tokens) - 1 for e in row) for row in rows))
    inputs = np.zeros((len(rows), width), np.int32)
    targets, mask = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
    segments = np.full_like(inputs, PADDING)
    for index, row in enumerate(rows):
        at = 0
        for number, example in enumerate(row):
            part = slice(at, at := at + len(example.tokens) - 1)
            inputs[index, part], targets[index, part] = example.tokens[:-1], example.tokens[1:]
            mask[index, part], segments[index, part] = example.targets_mask[1:], number
    return inputs, targets, mask, segments
