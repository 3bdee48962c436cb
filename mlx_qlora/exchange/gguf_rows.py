"""A planned tensor's rows, block by block, as the bytes that are written, with what they lost."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from mlx_qlora.errors import ModelError
from mlx_qlora.exchange.gguf_blocks import encode, encode_codes, encode_mxfp4
from mlx_qlora.exchange.gguf_layout import interleaved
from mlx_qlora.exchange.gguf_plan import Planned, row_blocks
from mlx_qlora.exchange.gguf_weights import Parameter
from mlx_qlora.weights.gguf_tensors import Type, dequantize


class Loss:
    """How far the written numbers are from the stored ones."""

    def __init__(self) -> None:
        self.changes = self.weights = self.largest = 0.0

    @property
    def relative(self) -> float:
        """Root of the squared changes over that of the squared weights."""
        return math.sqrt(self.changes / self.weights) if self.weights else 0.0

    def add(self, values: np.ndarray, written: np.ndarray) -> None:
        """Take some rows into account."""
        change = written.astype(np.float64) - values
        self.changes += float(np.square(change).sum())
        self.weights += float(np.square(values, dtype=np.float64).sum())
        self.largest = max(self.largest, float(np.abs(change).max()))


def encoded_rows(parameter: Parameter, planned: Planned, loss: Loss) -> Iterator[tuple[bytes, float]]:
    """Block by block the rows of a tensor as GGUF stores them, and the share of it that is done.

    Args:
        loss: Is told of every change, unless the plan knows that there is none.

    Raises:
        ModelError: the model holds numbers that are not finite, or too large for the type.
    """
    type_ = planned.entry.type
    for first, last in row_blocks(parameter, planned.rows_per_head):
        if planned.keeps_codes:
            raw = _recoded(parameter, type_, first, last)
        else:
            raw = _rewritten(parameter, planned, first, last)
        if not planned.is_exact:
            values = parameter.values(first, last).reshape(len(raw), -1).astype(np.float64) + planned.added
            written = dequantize(raw, type_)
            if not np.isfinite(written).all():
                raise _beyond(parameter, values, type_)
            loss.add(values, written)
        if planned.rows_per_head and len(parameter.shape) > 1:
            raw = raw[interleaved(len(raw), planned.rows_per_head)]
        yield raw.tobytes(), last / max(parameter.rows, 1)


def _recoded(parameter: Parameter, type_: Type, first: int, last: int) -> np.ndarray:
    codes = parameter.codes(first, last)
    if type_ == Type.MXFP4:
        return encode_mxfp4(codes, parameter.exponents(first, last))
    return encode_codes(codes, *parameter.scales(first, last), type_)


def _rewritten(parameter: Parameter, planned: Planned, first: int, last: int) -> np.ndarray:
    values = parameter.values(first, last)
    if not np.isfinite(values).all():
        raise _beyond(parameter, values, planned.entry.type)
    if values.ndim == 1 or len(planned.entry.shape) == 1:
        values = values.reshape(1, -1)
        if planned.rows_per_head:
            values = values[:, interleaved(values.size, planned.rows_per_head)]
    if planned.added:
        values = (values.astype(np.float64) + planned.added).astype(np.float32)
    return encode(values, planned.entry.type)


def _beyond(parameter: Parameter, values: np.ndarray, type_: Type) -> ModelError:
    if not np.isfinite(values).all():
        what, run = "holds numbers that are not finite; the model is damaged", None
    else:
        what, run = f"holds numbers too large for {type_.name}", "the same command with --type bf16 or f32"
    return ModelError(f"{parameter.name} {what}.", run=run)
