"""Several adapters on one base: each row of a batch goes through its own low-rank update."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_qlora.errors import AdapterError
from mlx_qlora.lora.adapter import AdapterInfo, load_adapter
from mlx_qlora.lora.embedding import LoRAEmbedding, embedding_shape
from mlx_qlora.lora.layers import LoRALinear, linear_shape
from mlx_qlora.lora.pissa import PiSSALinear, plain_update
from mlx_qlora.serving.jobs import Job
from mlx_qlora.serving.sampling import Drawing

BASE = 0
"""Row of the stacks that holds zeros: no adapter."""

Update = tuple[mx.array, mx.array]
"""A (in, rank) and B (rank, out), the scale in B; of an embedding, in is the vocabulary."""


@dataclass(eq=False)
class Row:
    """A job in the batch."""

    job: Job
    adapter: int
    """Row of the adapter stacks; 0 is the base."""
    drawing: Drawing
    steps: deque[tuple[StepLogprobs, int]] = field(default_factory=deque)
    """For each token drawn and not yet given: where its log-probability stands."""
    uid: int = -1
    """The batch generator's name for it."""


class StepLogprobs:
    """The log-probabilities of the tokens one step drew, read when they are asked for."""

    def __init__(self, logprobs_B: mx.array) -> None:
        self._array: mx.array | None = logprobs_B
        self._values: Any = None

    def __getitem__(self, row: int) -> float:
        if self._array is not None:
            self._values, self._array = self._array.tolist(), None
        return float(self._values[row])


class RowTags:
    """Stands among a batch's caches and is filtered, joined and split with them: it knows whose row is which.

    mlx-lm applies every change of a batch's rows to each of its caches, while prompts are read as well as
    later. So this list is in the order of the rows by construction.
    """

    nbytes = 0
    state: tuple[()] = ()
    """Nothing to evaluate."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __deepcopy__(self, _memo: object) -> RowTags:
        return RowTags(list(self.rows))  # the rows themselves, not copies

    @staticmethod
    def merge(tags: Sequence[RowTags]) -> RowTags:
        """The rows of several, one after the other."""
        return RowTags([row for tag in tags for row in tag.rows])

    def extend(self, other: RowTags) -> None:
        """Add another batch's rows behind these."""
        self.rows = [*self.rows, *other.rows]

    def filter(self, keep: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        self.rows = [self.rows[index] for index in keep]

    def extract(self, index: int) -> RowTags:
        """One row."""
        return RowTags([self.rows[index]])

    def prepare(self, **_: object) -> None:
        """Padding is nothing to a tag."""

    def finalize(self) -> None:
        """Padding is nothing to a tag."""

    def size(self) -> int:
        """Tokens in it: none."""
        return 0

    def empty(self) -> bool:
        """Whether it holds keys and values: it never does."""
        return True


class RowAdapters:
    """Which adapter each row of the current batch uses; shared by all layers of a model."""

    def __init__(self) -> None:
        self.index_B = mx.zeros((0,), mx.uint32)
        self.only: int | None = BASE
        """The adapter when all rows use the same one."""

    def set(self, adapters: Sequence[int]) -> None:
        """Row i of the next call uses ``adapters[i]``, a row of the stacks."""
        self.only = adapters[0] if len(set(adapters)) == 1 else None
        self.index_B = mx.array(list(adapters), mx.uint32)

    def index_for(self, num_rows: int) -> mx.array:
        """The adapter of each of `num_rows` leading rows of an input, (num_rows,).

        Raises:
            AdapterError: a layer is given rows that are not those of the batch.
        """
        size = self.index_B.size
        if size == 0 or num_rows % size:
            raise AdapterError(f"An adapted layer was given {num_rows} rows in a batch of {size}.")
        # Some layers see a batch's positions one after the other, as (B · T, in).
        return self.index_B if num_rows == size else mx.repeat(self.index_B, num_rows // size)


class RowLoRALinear(nn.Module):
    """A frozen linear layer plus, for each row, the low-rank update of the row's adapter.

    y = linear(x) + (x A[i]) B[i], where i is the row's adapter.

    Attributes:
        linear: The frozen layer, quantized or not.
        stack_a: A of each adapter, (1 + adapters, in, rank), zero-padded to the largest rank; row 0 is zeros.
        stack_b: scale · B of each, (1 + adapters, rank, out).

    Source: Hu et al. 2021, arXiv:2106.09685; rows of several adapters in one batch as in Chen et al. 2023
    (Punica), arXiv:2310.18547.
    """

    def __init__(self, linear: nn.Module, stack_a: mx.array, stack_b: mx.array, rows: RowAdapters) -> None:
        super().__init__()
        self.linear = linear
        self.stack_a = stack_a
        self.stack_b = stack_b
        self._rows = rows

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self.linear(x)
        only = self._rows.only
        if only == BASE:
            return y
        if only is not None:
            return y + (x @ self.stack_a[only]) @ self.stack_b[only]
        index = self._rows.index_for(x.shape[0])
        return y + _through(x, index, self.stack_a, self.stack_b).reshape(y.shape)


class RowLoRAEmbedding(nn.Module):
    """A frozen embedding plus, for each row, the low-rank update of the row's adapter; a tied head too.

    Attributes:
        embedding: The frozen layer, quantized or not.
        stack_a: A of each adapter, (1 + adapters, vocabulary, rank), as in `RowLoRALinear`.
        stack_b: scale · B of each, (1 + adapters, rank, features).
    """

    def __init__(self, embedding: nn.Module, stack_a: mx.array, stack_b: mx.array, rows: RowAdapters) -> None:
        super().__init__()
        self.embedding = embedding
        self.stack_a = stack_a
        self.stack_b = stack_b
        self._rows = rows

    def __call__(self, tokens: mx.array) -> mx.array:
        y: mx.array = self.embedding(tokens)
        if self._rows.only == BASE:
            return y
        index = self._rows.index_for(tokens.shape[0])
        at = index.reshape(-1, *[1] * (tokens.ndim - 1))
        z = self.stack_a[at, tokens]
        rows = z.reshape(tokens.shape[0], -1, z.shape[-1])
        return y + mx.gather_mm(rows, self.stack_b, rhs_indices=index).reshape(y.shape)

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits of hidden states: each row's updated embedding as a head."""
        y: mx.array = self.embedding.as_linear(x)
        if self._rows.only == BASE:
            return y
        index = self._rows.index_for(x.shape[0])
        update = _through(x, index, self.stack_b.swapaxes(1, 2), self.stack_a.swapaxes(1, 2))
        return y + update.reshape(y.shape)


def _through(x: mx.array, index: mx.array, first: mx.array, second: mx.array) -> mx.array:
    """Row i of x through ``first[index[i]]``, then ``second[index[i]]``."""
    rows = x.reshape(x.shape[0], -1, x.shape[-1])
    z = mx.gather_mm(rows, first, rhs_indices=index)
    return mx.gather_mm(z, second, rhs_indices=index)


def read_updates(
    model: nn.Module, name: str, folder: Path, info: AdapterInfo, *, fingerprint: str
) -> dict[str, Update]:
    """The low-rank updates in `folder` by the path of their layer; the model is as before.

    Args:
        name: What the adapter is called, for messages.
        fingerprint: Of the base that was loaded.

    Raises:
        AdapterError: the adapter does not fit the base, or cannot be applied row by row.
    """
    _refuse_dora(name, folder, info)
    try:
        load_adapter(model, folder, info, fingerprint=fingerprint)
        updates = {path: _update_of(layer) for path, layer in _attached(model)}
        mx.eval(updates)
        finite = mx.stack([mx.isfinite(a).all() & mx.isfinite(b).all() for a, b in updates.values()])
        if not finite.all().item():
            raise AdapterError(f"The adapter {name} holds numbers that are not finite.", where=str(folder))
        return updates
    finally:
        _detach(model)


def attach_rows(
    model: nn.Module, adapters: Sequence[Mapping[str, Update]], rows: RowAdapters, dtype: mx.Dtype
) -> None:
    """Give each layer that some adapter changes the stacks of all of them.

    Args:
        adapters: Adapter k is row k + 1 of the stacks; a layer that it does not change is zeros there.
        dtype: Of the stacks: the type of the model's activations.
    """
    modules = dict(model.named_modules())
    replacements: list[tuple[str, nn.Module]] = []
    for path in dict.fromkeys(path for updates in adapters for path in updates):
        layer = modules[path]
        is_embedding = isinstance(layer, nn.Embedding | nn.QuantizedEmbedding)
        shape = embedding_shape(layer) if is_embedding else linear_shape(layer)
        stack_a, stack_b = _stacks([updates.get(path) for updates in adapters], shape, dtype)
        mx.eval(stack_a, stack_b)
        kind = RowLoRAEmbedding if is_embedding else RowLoRALinear
        replacements.append((path, kind(layer, stack_a, stack_b, rows)))
    model.update_modules(tree_unflatten(replacements))
    model.freeze()


def _stacks(
    updates: Sequence[Update | None], shape: tuple[int, int], dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    size_in, size_out = shape
    rank = max(update[0].shape[1] for update in updates if update is not None)
    empty = (mx.zeros((size_in, 0)), mx.zeros((0, size_out)))
    padded_a, padded_b = [], []
    for a, b in [empty, *(update or empty for update in updates)]:
        missing = rank - a.shape[1]
        padded_a.append(mx.pad(a.astype(dtype), [(0, 0), (0, missing)]))
        padded_b.append(mx.pad(b.astype(dtype), [(0, missing), (0, 0)]))
    return mx.stack(padded_a), mx.stack(padded_b)


def _attached(model: nn.Module) -> list[tuple[str, Any]]:
    return [(p, m) for p, m in sorted(model.named_modules()) if isinstance(m, LoRALinear | LoRAEmbedding)]


def _update_of(layer: Any) -> Update:
    a, b = layer.lora_a, layer.lora_b
    if isinstance(layer, PiSSALinear):
        a, b = plain_update(a, b, layer.initial_a, layer.initial_b)
    return a, b * layer.scale


def _detach(model: nn.Module) -> None:
    bases = [
        (path, layer.embedding if isinstance(layer, LoRAEmbedding) else layer.linear)
        for path, layer in _attached(model)
    ]
    model.update_modules(tree_unflatten(bases))


def _refuse_dora(name: str, folder: Path, info: AdapterInfo) -> None:
    if info.lora.variant == "dora":
        raise AdapterError(
            f"The adapter {name} is a DoRA one: its layers are normalized with the base's weights, which "
            "cannot be done row by row. Fuse it into a model and serve that.",
            where=str(folder),
            run=f"mlx-qlora fuse --adapter-path {folder} …",
        )
