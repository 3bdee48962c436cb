"""Ranks: processes that compute one run together, each on its share of every update.

What decides anything is exchanged first, so that all ranks decide alike: the sums of an update, who is short
of memory, who was asked to stop. Rank 0 alone reads and writes the run's folder and hands on what it read;
the others need the model and the data, and no folder in common.
"""

from __future__ import annotations

import io
import json
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_qlora.errors import MlxQloraError
from mlx_qlora.objective.evaluate import Evaluation

BUCKET_BYTES = 8 * 1024**2
"""The most that one exchange carries: who watches sees progress at least so often."""

Item = TypeVar("Item")


class RankError(MlxQloraError):
    """Ranks that cannot work together, or did not stay alive."""


@dataclass
class Waiting:
    """Whether this rank waits for the others; written by the one thread that computes, read by any."""

    exchanges: int = 0
    """Begun so far."""
    since: float | None = None
    """When the one under way began (`time.monotonic`); None: the rank computes."""


class Ranks:
    """This process's place among the ranks, and what it does together with them.

    Every method that says *all together* must be called by all ranks in the same order.

    Args:
        group: MLX's; None for a process on its own, for which every exchange is the identity.
        local_rank: Which of its machine's ranks this is.
        most_local: Ranks on the machine that has most of them.
        num_local: Ranks on this machine.
    """

    def __init__(
        self, group: Any = None, *, local_rank: int = 0, num_local: int = 1, most_local: int = 1
    ) -> None:
        self._group = group
        self.rank: int = group.rank() if group is not None else 0
        self.size: int = group.size() if group is not None else 1
        self.local_rank, self.num_local, self.most_local = local_rank, num_local, most_local
        self.waiting = Waiting()

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other rank."""
        return self.size == 1

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This rank's part of items that all ranks have: each item is one rank's."""
        return items[self.rank :: self.size]

    def table(self, *numbers: float) -> np.ndarray:
        """All together: every rank's numbers, (ranks, numbers) float64, bit for bit."""
        row = np.array([numbers], np.float64)
        if self.is_alone:
            return row
        words = mx.array(row.view(np.uint32))  # as integers: MLX's GPU knows no float64
        gathered = self._exchanged(mx.distributed.all_gather(words, group=self._group))
        return np.array(gathered).view(np.float64)

    def total(self, *numbers: float) -> list[float]:
        """All together: the sum of each number over the ranks, the same on all of them."""
        rows = self.table(*numbers)
        return [float(sum(column)) for column in rows.T]  # in the order of the ranks

    def highest(self, *numbers: float) -> list[float]:
        """All together: the largest of each number."""
        return [float(value) for value in self.table(*numbers).max(axis=0)]

    def summed(self, tree: Any) -> Any:
        """All together: the sum of each array of a tree over the ranks, in float32 on the way.

        All ranks get the same bits: each element is summed along the ring once, and the sum passed on.
        """
        if self.is_alone:
            return tree
        flat = tree_flatten(tree)
        vector = mx.concatenate([array.reshape(-1).astype(mx.float32) for _, array in flat])
        mx.eval(vector)
        bounds = np.cumsum([array.size for _, array in flat])[:-1].tolist()
        pieces = mx.split(self._all_sum(vector), bounds)
        pairs = zip(flat, pieces, strict=True)
        return tree_unflatten([(k, p.reshape(a.shape).astype(a.dtype)) for (k, a), p in pairs])

    def together(self, evaluation: Evaluation) -> Evaluation:
        """All together: the evaluation of all ranks' rows from that of each rank's own."""
        if self.is_alone:
            return evaluation
        has_rows = evaluation.target_tokens > 0
        nll = evaluation.loss_nats * evaluation.target_tokens if has_rows else 0.0
        total_nll, tokens = self.total(nll, evaluation.target_tokens)
        return Evaluation(total_nll / tokens if tokens else float("nan"), int(tokens))

    def bytes_from_first(self, payload: bytes | None) -> bytes:
        """All together: what rank 0 gives; the others give None."""
        if self.is_alone:
            return payload or b""
        own = payload if self.is_first and payload is not None else b""
        length = int(self.table(len(own))[0, 0])
        words = np.zeros(-(-length // 4), np.uint32)
        words.view(np.uint8)[: len(own)] = np.frombuffer(own, np.uint8)
        received = self._all_sum(mx.array(words))  # the others add zeros; integers keep every bit
        return np.array(received).view(np.uint8)[:length].tobytes()

    def value_from_first(self, value: Any) -> Any:
        """All together: rank 0's value, as JSON carries it."""
        if self.is_alone:
            return value
        return json.loads(self.bytes_from_first(json.dumps(value).encode() if self.is_first else None))

    def tensors_from_first(self, tensors: Mapping[str, mx.array] | None) -> dict[str, mx.array]:
        """All together: rank 0's arrays, bit for bit."""
        if self.is_alone:
            return dict(tensors or {})
        buffer = io.BytesIO()
        if self.is_first:
            mx.save_safetensors(buffer, dict(tensors or {}))
        received = mx.load(io.BytesIO(self.bytes_from_first(buffer.getvalue())), format="safetensors")
        mx.eval(received)
        return received  # type: ignore[return-value]  # safetensors hold a dictionary

    def meet(self) -> None:
        """All together: go on when all are here."""
        self.table(0.0)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """All together: the ranks of one machine one after the other, those of different machines at once.

        For work that leaves files another rank of the machine then finds. Who fails there ends the run.
        """
        if self.most_local == 1:
            yield
            return
        for _ in range(self.local_rank):
            self.meet()
        yield
        for _ in range(self.most_local - self.local_rank):
            self.meet()

    def check_same(self, **values: str) -> None:
        """All together: refuse ranks that do not have the same of what must be the same.

        Raises:
            RankError: names what differs, and the ranks; on every rank.
        """
        if self.is_alone:
            return
        rows = self.table(*(zlib.crc32(text.encode()) for text in values.values()))
        lines = []
        for column, name in enumerate(values):
            others = np.flatnonzero(rows[:, column] != rows[0, column]).tolist()
            if others:
                lines.append(f"  {name}: on rank {', '.join(map(str, others))} it is not rank 0's")
        if lines:
            raise RankError("The ranks do not have the same run:\n" + "\n".join(lines))

    def _all_sum(self, vector: mx.array) -> mx.array:
        """In buckets, one exchange each."""
        step = BUCKET_BYTES // vector.dtype.size
        parts = [vector[first : first + step] for first in range(0, vector.size, step)]
        sums = [self._exchanged(mx.distributed.all_sum(part, group=self._group)) for part in parts]
        return mx.concatenate(sums) if sums else vector

    def _exchanged(self, result: mx.array) -> mx.array:
        self.waiting.exchanges += 1
        self.waiting.since = time.monotonic()
        mx.eval(result)
        self.waiting.since = None
        return result


ALONE = Ranks()
"""A run of one process."""


def fingerprint_of(tensors: Mapping[str, mx.array]) -> float:
    """A checksum of arrays, in the order of their names, exact as a float64."""
    value = 0
    for name in sorted(tensors):
        flat = tensors[name].reshape(-1)
        words = np.array(flat.view(mx.uint8)) if flat.size else np.zeros(0, np.uint8)
        value = zlib.crc32(words.tobytes(), zlib.crc32(name.encode(), value))
    return float(value)
