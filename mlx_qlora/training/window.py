"""What an epoch costs in positions and attention, and what other windows would make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlx_qlora.config import DataConfig
from mlx_qlora.dataset.batches import Layout
from mlx_qlora.dataset.packing import pack, padded_length

MAX_ROWS = 20_000
"""So many rows, evenly spread, speak for all."""

CUT_SHARE = 0.02
"""Of the rows a shorter window may cut."""

_MULTIPLE = 32


@dataclass(frozen=True, kw_only=True)
class Window:
    """How long a run's rows are, and how it lays them out."""

    lengths: tuple[int, ...]
    """Tokens of each training row."""
    batch_size: int
    layout: Layout
    seed: int = 0
    may_pack: bool = False
    """Whether the model keeps several examples in a row apart."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """Another window, and what it would do to the cost of an epoch."""

    assignment: str
    factor: float
    """Cost of an epoch now, over its cost then."""
    effect: str
    """What else changes, for a person."""


def epoch_cost(window: Window) -> float:
    """Cost of the first epoch's micro-batches, in the units of `Layout`: positions · (linear + attended)."""
    positions = [length - 1 for length in window.lengths]
    rng = np.random.default_rng([window.seed, 0])  # as `Batches`
    order = rng.permutation(len(positions))
    rows = _rows([positions[at] for at in order], window.layout)
    if window.layout.row_capacity is not None:
        rows = [rows[at] for at in rng.permutation(len(rows))]
    size = window.batch_size
    return sum(_cost(rows[at : at + size], window.layout) for at in range(0, len(rows), size))


def best_window(window: Window, data: DataConfig) -> Change | None:
    """The cheaper of: a window that cuts few rows, and packing; None when neither can be had."""
    step = -(-len(window.lengths) // MAX_ROWS) if window.lengths else 1
    window = replace(window, lengths=window.lengths[::step])
    if not window.lengths:
        return None
    now = epoch_cost(window)
    changes = [change for change in (_shorter(window, now), _packed(window, data, now)) if change]
    return max(changes, key=lambda change: change.factor, default=None)


def _rows(positions: Sequence[int], layout: Layout) -> list[list[int]]:
    if layout.row_capacity is None:
        return [[each] for each in positions]
    return [[positions[item] for item in row] for row in pack(list(positions), layout.row_capacity)]


def _cost(rows: Sequence[Sequence[int]], layout: Layout) -> float:
    widths = [padded_length(sum(row)) for row in rows]
    longest = padded_length(max(each for row in rows for each in row))
    is_packed = any(len(row) > 1 for row in rows)
    if not is_packed and layout.concatenates([row[0] for row in rows]):
        total = padded_length(sum(row[0] for row in rows))
        return total * (layout.linear_cost + (longest if layout.is_banded else total))
    width = max(widths)
    attended = longest if is_packed and layout.is_banded else width
    return len(rows) * width * (layout.linear_cost + attended)


def _shorter(window: Window, now: float) -> Change | None:
    enough = float(np.quantile(window.lengths, 1 - CUT_SHARE, method="higher"))
    shorter = -(-int(enough) // _MULTIPLE) * _MULTIPLE
    if shorter >= max(window.lengths):
        return None
    cut = sum(length > shorter for length in window.lengths) / len(window.lengths)
    layout = window.layout
    if layout.row_capacity is not None:
        layout = replace(layout, row_capacity=shorter - 1)
    lengths = tuple(min(length, shorter) for length in window.lengths)
    then = epoch_cost(replace(window, lengths=lengths, layout=layout))
    return Change(
        assignment=f"data.max_seq_length={shorter}",
        factor=now / then,
        effect=f"with a window of {shorter}, which cuts {cut:.1%} of the rows",
    )


def _packed(window: Window, data: DataConfig, now: float) -> Change | None:
    if data.packing or not window.may_pack:
        return None
    layout = replace(window.layout, row_capacity=data.max_seq_length - 1)
    rows = len(_rows([length - 1 for length in window.lengths], layout))
    then = epoch_cost(replace(window, layout=layout))
    return Change(
        assignment="data.packing=true",
        factor=now / then,
        effect=f"with several examples in a row ({len(window.lengths) / rows:.1f} on average, and as many "
        "times fewer updates to an epoch)",
    )
