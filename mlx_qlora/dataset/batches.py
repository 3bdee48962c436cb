"""Examples in batches: a seeded permutation per epoch, seekable by step, nothing lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_qlora.dataset.packing import concatenated, pack, padded_length
from mlx_qlora.dataset.records import Example
from mlx_qlora.errors import DataError


@dataclass(frozen=True)
class Batch:
    """One micro-batch, padded on the right. Shapes: B rows, T tokens."""

    inputs_BT: np.ndarray
    targets_BT: np.ndarray
    """The token after each input."""
    mask_BT: np.ndarray
    """Where `targets_BT` is trained on."""
    tokens: int
    """Real tokens, padding excluded."""
    segments_BT: np.ndarray | None = None
    """Which example a position belongs to, -1 behind the last; None when each row is one example."""
    longest: int = field(default=0)
    """No example has more positions; 0 when that was not counted."""
    examples: tuple[tuple[int, ...], ...] = ()
    """For each row, the numbers of the examples that stand in it, end to end; empty when they have none."""
    target_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_tokens", int(self.mask_BT.sum()))


@dataclass(frozen=True)
class Layout:
    """How the examples of a micro-batch are laid out.

    Side by side, short examples are padded to the longest. End to end in one row nothing is padded, but
    attention looks over the whole row. What is cheaper is decided for each micro-batch.
    """

    may_concatenate: bool = False
    """Whether the model keeps examples in one row apart."""
    linear_cost: float = 0.0
    """Cost of a token's linear layers, in units of attending to one more position."""
    row_capacity: int | None = None
    """Pack each epoch into rows of so many positions, instead of taking examples one by one."""
    is_banded: bool = False
    """Whether attention in a shared row looks no further back than the longest example."""
    longest_row: int | None = None
    """Positions the model can tell apart; None has no limit."""

    def concatenates(self, lengths: Sequence[int]) -> bool:
        """Whether examples with so many positions are cheaper end to end."""
        total, width = padded_length(sum(lengths)), padded_length(max(lengths))
        fits = self.longest_row is None or total <= self.longest_row
        end_to_end = total * (self.linear_cost + (width if self.is_banded else total))
        side_by_side = len(lengths) * width * (self.linear_cost + width)
        return self.may_concatenate and fits and end_to_end < side_by_side


PADDED = Layout()
"""Side by side, always."""


class Batches:
    """The micro-batches of each optimizer step: a pure function of the seed and of the step.

    Raises:
        DataError: there are no examples.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        gradient_accumulation: int,
        seed: int,
        layout: Layout = PADDED,
    ) -> None:
        if not examples:
            raise DataError("There is no row to train on.")
        self.batch_size, self.gradient_accumulation = batch_size, gradient_accumulation
        self.seed, self.layout = seed, layout
        self.num_examples = len(examples)
        self._buffer = _buffer(examples)
        self._lengths = [len(example.tokens) - 1 for example in examples]
        self.micro_batches_per_epoch = -(-len(self._rows(0)) // batch_size)
        self.steps_per_epoch = -(-self.micro_batches_per_epoch // gradient_accumulation)
        self.rank, self.num_ranks = 0, 1
        self._epoch: int | None = None

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of global step `step`, counted from 0; an epoch's last may be fewer.

        Of a share, a step may have none.
        """
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            rows = self._rows(epoch)
            self._row_lengths = [len(row) for row in rows]
            self._order = [index for row in rows for index in row]
            self._permuted = self._buffer.perm(self._order)
            self._begins = np.concatenate([[0], np.cumsum(self._row_lengths)])
            self._epoch = epoch
        first = place * self.gradient_accumulation * self.batch_size
        last = min(first + self.gradient_accumulation * self.batch_size, len(self._row_lengths))
        mine = self._mine(range(first, last))
        return [
            self._micro_batch(mine[at : at + self.batch_size]) for at in range(0, len(mine), self.batch_size)
        ]

    def shared(self, rank: int, num_ranks: int) -> Batches:
        """The part of the same updates that rank `rank` of `num_ranks` does: all parts are the whole.

        Rows go to the ranks so that each has about as many tokens, and a rank of an update with fewer rows
        than ranks may have none.
        """
        part = copy(self)
        part.rank, part.num_ranks = rank, num_ranks
        part._epoch = None
        return part

    def halved(self) -> Batches | None:
        """The same updates in twice as many micro-batches of half the size; None where a size is odd."""
        if self.batch_size % 2:
            return None
        smaller = copy(self)
        smaller.batch_size, smaller.gradient_accumulation = (
            self.batch_size // 2,
            self.gradient_accumulation * 2,
        )
        smaller.micro_batches_per_epoch = -(-len(self._rows(0)) // smaller.batch_size)
        smaller._epoch = None
        return smaller

    def _rows(self, epoch: int) -> list[list[int]]:
        """The epoch's examples in the epoch's order; packed, several to a row."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.num_examples)
        if self.layout.row_capacity is None:
            return [[int(index)] for index in order]
        packed = pack([self._lengths[index] for index in order], self.layout.row_capacity)
        return [[int(order[item]) for item in packed[row]] for row in rng.permutation(len(packed))]

    def _mine(self, rows: Sequence[int]) -> Sequence[int]:
        """The rows of an update that are this rank's, in the epoch's order."""
        if self.num_ranks == 1:
            return rows
        tokens = {row: sum(self._lengths[at] for at in self._examples_of(row)) for row in rows}
        loads = [0] * self.num_ranks
        mine = []
        for row in sorted(
            rows, key=lambda row: (-tokens[row], row)
        ):  # the longest first: loads come out even
            lightest = loads.index(min(loads))
            loads[lightest] += tokens[row]
            if lightest == self.rank:
                mine.append(row)
        return sorted(mine)

    def _examples_of(self, row: int) -> list[int]:
        return self._order[self._begins[row] : self._begins[row + 1]]

    def _micro_batch(self, numbers: Sequence[int]) -> Batch:
        places = [range(self._begins[n], self._begins[n + 1]) for n in numbers]
        rows = [[_example(self._permuted[at]) for at in row] for row in places]
        return collated(rows, self.layout, [[self._order[at] for at in row] for row in places])


def in_order(examples: Sequence[Example], batch_size: int, layout: Layout = PADDED) -> Iterator[Batch]:
    """All examples once, the short ones together, for validation."""
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    for first in range(0, len(ordered), batch_size):
        yield collated([[example] for example in ordered[first : first + batch_size]], layout)


def collated(
    rows: Sequence[Sequence[Example]], layout: Layout, numbers: Sequence[Sequence[int]] = ()
) -> Batch:
    """One micro-batch of rows, each one example or several packed ones.

    Args:
        numbers: Of the examples, in the same order, where they have any.
    """
    tokens = sum(len(example.tokens) for row in rows for example in row)
    is_packed = any(len(row) > 1 for row in rows)
    if not is_packed and layout.concatenates([len(row[0].tokens) - 1 for row in rows]):
        rows, is_packed = [[example for row in rows for example in row]], True
        numbers = [[number for row in numbers for number in row]] if numbers else ()
    inputs, targets, mask, segments = concatenated(rows)
    longest = padded_length(max(len(example.tokens) - 1 for row in rows for example in row))
    held = tuple(map(tuple, numbers))
    return Batch(inputs, targets, mask, tokens, segments if is_packed else None, longest, held)


def _buffer(examples: Sequence[Example]) -> Any:
    import mlx.data as dx

    return dx.buffer_from_vector(
        [
            {
                "tokens": example.tokens.astype(np.int32),
                "targets": example.targets_mask.astype(np.int8),
            }
            for example in examples
        ]
    )


def _example(sample: dict[str, np.ndarray]) -> Example:
    return Example(sample["tokens"], sample["targets"].astype(bool), source="")
