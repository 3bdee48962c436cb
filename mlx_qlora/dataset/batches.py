"""Examples in batches: a seeded permutation per epoch, seekable by step, nothing lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlx_qlora.dataset.records import Example

MULTIPLE = 32


@dataclass(frozen=True)
class Batch:
    """One micro-batch, padded on the right. Shapes: B rows, T tokens, T a multiple of 32."""

    inputs_BT: np.ndarray
    targets_BT: np.ndarray
    """The token after each input."""
    mask_BT: np.ndarray
    """Where `targets_BT` is trained on."""
    tokens: int
    """Real tokens, padding excluded."""
    target_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_tokens", int(self.mask_BT.sum()))


class Batches:
    """The micro-batches of each optimizer step: a pure function of the seed and of the step."""

    def __init__(
        self, examples: Sequence[Example], batch_size: int, gradient_accumulation: int, seed: int
    ) -> None:
        import mlx.data as dx

        self.batch_size, self.gradient_accumulation, self.seed = batch_size, gradient_accumulation, seed
        self.num_examples = len(examples)
        self.micro_batches_per_epoch = -(-self.num_examples // batch_size)
        self.steps_per_epoch = -(-self.micro_batches_per_epoch // gradient_accumulation)
        self._buffer = dx.buffer_from_vector([_sample(example) for example in examples])
        self._epoch: int | None = None

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of global step `step`, counted from 0; an epoch's last may be fewer."""
        epoch, place = divmod(step, self.steps_per_epoch)
        self._seek(epoch)
        first = place * self.gradient_accumulation
        last = min(first + self.gradient_accumulation, self.micro_batches_per_epoch)
        return [_collated(self._batched[index]) for index in range(first, last)]

    def _seek(self, epoch: int) -> None:
        if epoch != self._epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.num_examples)
            self._batched = _batched(self._buffer.perm(order.tolist()), self.batch_size)
            self._epoch = epoch


def in_order(examples: Sequence[Example], batch_size: int) -> Iterator[Batch]:
    """All examples once, the short ones together, for validation."""
    import mlx.data as dx

    if not examples:
        return
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    batched = _batched(dx.buffer_from_vector([_sample(example) for example in ordered]), batch_size)
    for index in range(len(batched)):
        yield _collated(batched[index])


def _sample(example: Example) -> dict[str, np.ndarray]:
    return {
        "tokens": example.tokens.astype(np.int32),
        "mask": example.targets_mask.astype(np.int8),
        "length": np.array(len(example.tokens), np.int32),
    }


def _batched(buffer: Any, batch_size: int) -> Any:
    return buffer.batch(batch_size, pad={"tokens": 0, "mask": 0})


def _collated(rows: dict[str, np.ndarray]) -> Batch:
    tokens, mask = rows["tokens"], rows["mask"]
    width = max(MULTIPLE, -(-(tokens.shape[1] - 1) // MULTIPLE) * MULTIPLE)
    extra = ((0, 0), (0, width + 1 - tokens.shape[1]))
    tokens, mask = np.pad(tokens, extra), np.pad(mask, extra)
    return Batch(tokens[:, :-1], tokens[:, 1:], mask[:, 1:].astype(bool), tokens=int(rows["length"].sum()))
