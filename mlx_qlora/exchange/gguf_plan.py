"""Which GGUF type each tensor gets, decided before anything is written, from types, shapes and scales."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mlx_qlora.errors import ConfigError, ModelError, listed
from mlx_qlora.exchange.gguf_blocks import CODED, can_hold_width, code_error, recoding_error
from mlx_qlora.exchange.gguf_layout import Layout, is_kept_in_float32
from mlx_qlora.exchange.gguf_weights import Parameter, parameters
from mlx_qlora.exchange.gguf_writer import GgufEntry
from mlx_qlora.weights.gguf_tensors import FLOATS, Type
from mlx_qlora.weights.source import ModelSource

AUTO = "auto"
TYPES = {type_.name.lower(): type_ for type_ in (*FLOATS, *CODED)}
"""What ``--type`` takes beside ``auto``."""

BLOCK_BYTES = 16 * 1024**2
"""Rows are read in blocks of about this many bytes of float32: what bounds memory."""

TOLERATED = 1 / 4
"""Keeping codes under float16 scales may move weights by this share of what rounding to codes has done:
together, as a root of squares, that is 3 % more than the latter alone."""


@dataclass(frozen=True)
class Planned:
    """One tensor of the file."""

    parameter: str
    entry: GgufEntry
    keeps_codes: bool
    """Whether the stored codes go over as they are; else the numbers are written anew."""
    is_exact: bool
    """Known to be the same numbers; else the writing measures what was lost."""
    reason: str | None
    """Why it is not of the type that was asked for."""
    rows_per_head: int | None
    added: float
    num_bytes: int
    """To be read."""


def asked_type(name: str) -> Type | None:
    """The type behind a name; None for ``auto``.

    Raises:
        ConfigError: there is no such type.
    """
    if name == AUTO:
        return None
    if name not in TYPES:
        raise ConfigError(
            f"There is no --type {name}; there are {AUTO}, {', '.join(TYPES)}.",
            run="mlx-qlora export-gguf MODEL --output FILE.gguf   # auto: keeps every number if it can",
        )
    return TYPES[name]


def plan_tensors(source: ModelSource, layout: Layout, wanted: Type | None) -> list[Planned]:
    """Every tensor's name, type and shape, in the order they will be written.

    Raises:
        ModelError: a parameter has no place in the file; all are listed.
        WeightsError: the model's own files do not hold together.
    """
    planned, problems = [], []
    for parameter in parameters(source):
        try:
            planned.append(_planned(parameter, layout, wanted))
        except ValueError as error:
            problems.append(f"{parameter.name}: {error}")
    if problems:
        raise ModelError(
            f"{len(problems)} tensors cannot be exported:\n{listed(problems)}", where=str(source.folder)
        )
    return planned


def row_blocks(parameter: Parameter, rows_together: int | None) -> Iterator[tuple[int, int]]:
    """Runs of rows [first, last), each a whole number of heads where rows belong together."""
    if len(parameter.shape) < 2:
        yield 0, parameter.rows
        return
    together = rows_together or 1
    count = max(1, BLOCK_BYTES // (4 * parameter.shape[-1] * together)) * together
    for first in range(0, parameter.rows, count):
        yield first, min(first + count, parameter.rows)


def _planned(parameter: Parameter, layout: Layout, wanted: Type | None) -> Planned:
    name = layout.name_of(parameter.name)
    shape = parameter.shape
    rows_per_head = layout.rows_per_head(parameter.name, shape[0])
    added, reason = layout.added_to(parameter.name), None
    if is_kept_in_float32(name, shape):
        shape = tuple(size for size in shape if size != 1) or (1,)
        type_, keeps_codes, is_exact = Type.F32, False, not added
    else:
        if wanted is not None and not can_hold_width(wanted, shape[-1]):
            reason = f"rows of {shape[-1]} are no whole blocks of 32"
            wanted = Type.F16
        type_, keeps_codes, is_exact = _chosen(parameter, wanted)
    if wanted not in (None, type_) and reason is None and type_ != Type.F32:
        reason = f"{wanted.name} has no room for it"
    entry = GgufEntry(name, type_, shape)
    return Planned(
        parameter.name,
        entry,
        keeps_codes,
        is_exact,
        reason,
        rows_per_head,
        added,
        parameter.num_bytes,
    )


def _chosen(parameter: Parameter, wanted: Type | None) -> tuple[Type, bool, bool]:
    """(type, whether codes are kept, whether every number is)."""
    if parameter.packing is None:
        return _for_floats(parameter, wanted)
    if parameter.is_affine:
        return _for_affine(parameter, wanted)
    if parameter.packing.mode == "mxfp4" and wanted is None:
        return Type.MXFP4, True, True
    if wanted is not None:
        return wanted, False, wanted == Type.F32
    return _nearest_float(parameter), False, False


def _for_floats(parameter: Parameter, wanted: Type | None) -> tuple[Type, bool, bool]:
    own = parameter.float_type
    if own is None:
        raise ValueError(f"of type {parameter.dtype}")
    type_ = own if wanted is None else wanted
    return type_, False, type_ in (own, Type.F32)


def _for_affine(parameter: Parameter, wanted: Type | None) -> tuple[Type, bool, bool]:
    """The smallest that keeps every number; else the smallest that keeps the codes; else one written anew."""
    bits = parameter.packing.bits if parameter.packing else 0
    errors = dict.fromkeys(CODED if wanted is None else {wanted} & set(CODED), 0.0)
    rounded = 0.0
    for first, last in row_blocks(parameter, None):
        scales, biases = parameter.scales(first, last)
        if not (np.isfinite(scales).all() and np.isfinite(biases).all()):
            raise ValueError("holds scales that are not finite; the model is damaged")
        for type_ in errors:
            errors[type_] += recoding_error(type_, bits, scales, biases)
        rounded += code_error(scales)
    for most in (0.0, TOLERATED * math.sqrt(rounded)):
        for type_, error in errors.items():
            if math.sqrt(error) <= most:
                return type_, True, error == 0
    if wanted is not None:
        return wanted, False, wanted == Type.F32
    if bits > CODED[Type.Q5_1].bits:
        return Type.Q8_0, False, False
    return _nearest_float(parameter), False, False


def _nearest_float(parameter: Parameter) -> Type:
    """Float16 or bfloat16, whichever has every number; float16 where neither has, if none is too large."""
    has_all, is_finite = {Type.F16: True, Type.BF16: True}, True
    for first, last in row_blocks(parameter, None):
        values = parameter.values(first, last)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16).astype(np.float32)
        has_all[Type.F16] &= bool((half == values).all())
        has_all[Type.BF16] &= bool((values.view(np.uint32) & 0xFFFF == 0).all())
        is_finite &= bool(np.isfinite(half).all())
    for type_, has in has_all.items():
        if has:
            return type_
    return Type.F16 if is_finite else Type.BF16
