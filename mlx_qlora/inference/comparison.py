"""Storage formats of one model side by side: what each costs, and what it does to the answers."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from mlx_qlora.dataset.files import find_files
from mlx_qlora.errors import ConfigError, MlxQloraError, ModelError, listed
from mlx_qlora.inference.comparison_process import measured
from mlx_qlora.inference.comparison_worker import Measured, Task
from mlx_qlora.quantization.policy import read_scheme
from mlx_qlora.quantization.schemes import UNQUANTIZED, Scheme
from mlx_qlora.storage import remove_folder, said_clearly
from mlx_qlora.weights.loader import cache_folder, cache_root
from mlx_qlora.weights.plan import plan_quantization
from mlx_qlora.weights.shards import read_checkpoint
from mlx_qlora.weights.source import ModelSource, fingerprint, resolve_model
from mlx_qlora.weights.stream import SHARD_BYTES, quantize_checkpoint

FLOAT_NAMES = (*UNQUANTIZED, "fp32", "float32")
"""Names of the checkpoint as it is, whatever type it is stored in."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is compared, and on what."""

    model: str
    schemes: tuple[str, ...]
    """As quantization.scheme takes them, with a group size if it is another (int4-g32), or `FLOAT_NAMES`."""
    data: dict[str, Any]
    """Keys of a DataConfig, path among them; those that are left out are the adapter's or the default."""
    split: str | None = None
    """train, valid or test; None takes the first of test, valid and train that has rows."""
    reference: str = "none"
    """The scheme that the others are compared with: the float checkpoint, or one that fits in memory."""
    adapter_path: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    max_rows: int | None = None
    batch_size: int = 4
    generated_tokens: int = 64
    max_questions: int = 100


@dataclass(frozen=True, kw_only=True)
class Row:
    """One scheme: what is stored, and what was measured; or why nothing was."""

    scheme: str
    is_reference: bool = False
    stored_as: str = ""
    """Type of the floating tensors of the checkpoint; of a quantized one the name and the group size."""
    bytes_on_disk: int | None = None
    """Of the weight files."""
    bits_per_weight: float | None = None
    """As stored: all tensors, scales and what stays unquantized."""
    kept_layers: tuple[str, ...] = ()
    """``path (why)`` of each layer that stays unquantized."""
    measured: Measured | None = None
    problem: str | None = None

    @property
    def perplexity(self) -> float | None:
        """exp(loss): as many equally likely next tokens would be as surprising."""
        return math.exp(min(self.measured.loss_nats, 700.0)) if self.measured else None

    def as_dict(self) -> dict[str, Any]:
        """The fields and `perplexity`, ready for JSON; what was measured stands beside the others."""
        own = {name: value for name, value in asdict(self).items() if name != "measured"}
        return {**own, **(asdict(self.measured) if self.measured else {}), "perplexity": self.perplexity}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All schemes, the reference first, in the order they were asked for."""

    model: str
    """As it was asked for; so is the data."""
    data: str
    num_parameters: int
    rows: tuple[Row, ...]

    @property
    def reference(self) -> Row:
        """What the others are compared with."""
        return next(row for row in self.rows if row.is_reference)

    def perplexity_change(self, row: Row) -> float | None:
        """By what share a row's perplexity is above the reference's: 0.01 is one per cent."""
        if row.measured is None or self.reference.measured is None:
            return None
        return math.expm1(min(row.measured.loss_nats - self.reference.measured.loss_nats, 700.0))

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        rows = [{**row.as_dict(), "perplexity_change": self.perplexity_change(row)} for row in self.rows]
        return {**asdict(self), "rows": rows}


def compare(
    request: Request,
    on_phase: Callable[[str, str], None] | None = None,
    on_bytes: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Measure each scheme in a process of its own, one after the other.

    The reference is measured first, and keeps on disk what it says of each labelled token: hidden states
    where its head is a matrix, all logits where it is not. Quantized copies that are not in the user's cache
    already are made for the comparison and deleted again, one at a time. A scheme that fails has a row with
    the reason, and the others go on.

    Args:
        on_phase: Called with (scheme, what happens now).
        on_bytes: Called with (bytes read, bytes to read) while a copy is quantized.

    Raises:
        ConfigError: a scheme does not exist, or no data is named.
        DataError: the data cannot be used, or has no labelled token.
        MlxQloraError: the reference cannot be measured.
    """
    names = list(dict.fromkeys(request.schemes))
    schemes = _read_schemes([*names, request.reference])
    find_files(request.data.get("path"))
    source = resolve_model(request.model, request.revision, request.trust_remote_code)
    if source.is_quantized:
        raise ModelError(
            "This model is quantized already; schemes are compared from the checkpoint it was made from.",
            where=str(source.folder),
            run="mlx-qlora compare --model OWNER/NAME …   # of 16 or 32 bits",
        )
    first = next((name for name in names if schemes[name] == schemes[request.reference]), request.reference)
    rows = []
    with _work_folder() as work:
        (work / "reference").mkdir()
        told = on_phase or (lambda _scheme, _phase: None)
        for name in [first, *(name for name in names if name != first)]:
            row = Row(scheme=name, is_reference=name == first)
            try:
                row = _compared(row, schemes[name], source, request, work, told, on_bytes)
            except MlxQloraError as error:
                if row.is_reference:
                    raise
                row = replace(row, problem=error.what)
            rows.append(row)
    size = sum(math.prod(info.shape) for info in read_checkpoint(source.folder).values())
    return Comparison(
        model=request.model, data=str(request.data["path"]), num_parameters=size, rows=tuple(rows)
    )


def _read_schemes(names: Sequence[str]) -> dict[str, Scheme | None]:
    """Name → scheme; None for the checkpoint as it is.

    Raises:
        ConfigError: some do not exist; all of them are listed.
    """
    schemes: dict[str, Scheme | None] = {}
    problems: list[ConfigError] = []
    for name in names:
        try:
            schemes[name] = None if name in FLOAT_NAMES else read_scheme(name, "--schemes")
        except ConfigError as error:
            problems.append(error)
    run = "mlx-qlora compare --schemes fp16,int8,int4,nf4-dq …"
    if not names[:-1]:
        raise ConfigError("There is no scheme to compare.", where="--schemes", run=run)
    if problems:
        told = listed([problem.what for problem in problems])
        raise ConfigError(
            f"{len(problems)} scheme(s) cannot be compared:\n{told}", where="--schemes", run=run
        )
    return schemes


def _compared(
    row: Row,
    scheme: Scheme | None,
    source: ModelSource,
    request: Request,
    work: Path,
    on_phase: Callable[[str, str], None],
    on_bytes: Callable[[int, int], None] | None,
) -> Row:
    """`row` with its figures."""
    copy = work / "copy"
    try:
        folder, row = source.folder, replace(row, stored_as=float_type(source.folder))
        if scheme is not None:
            on_phase(row.scheme, "quantizing")
            folder, row = _quantized(row, scheme, source, copy, on_bytes)
        tensors = read_checkpoint(folder).values()
        num_parameters = sum(math.prod(info.shape) for info in read_checkpoint(source.folder).values())
        row = replace(
            row,
            bytes_on_disk=sum(file.stat().st_size for file in {info.file for info in tensors}),
            bits_per_weight=8 * sum(info.num_bytes for info in tensors) / num_parameters,
        )
        task = Task(
            folder=str(folder),
            reference=str(work / "reference"),
            is_reference=row.is_reference,
            data=request.data,
            split=request.split,
            adapter_path=request.adapter_path,
            trust_remote_code=request.trust_remote_code,
            max_rows=request.max_rows,
            batch_size=request.batch_size,
            generated_tokens=request.generated_tokens,
            max_questions=request.max_questions,
        )
        return replace(row, measured=measured(task, work, lambda phase: on_phase(row.scheme, phase)))
    finally:
        remove_folder(copy)


def _quantized(
    row: Row, scheme: Scheme, source: ModelSource, copy: Path, on_bytes: Callable[[int, int], None] | None
) -> tuple[Path, Row]:
    """A folder with the model in `scheme`: the cached copy if there is one, else `copy`.

    Raises:
        ModelError: no layer can have this scheme.
    """
    plan = plan_quantization(source, scheme, (), SHARD_BYTES)
    if not any(job.scheme for shard in plan.shards for job in shard):
        reasons = listed(list(dict.fromkeys(layer.reason for layer in plan.skipped)), limit=3)
        raise ModelError(f"No layer of this model can be stored so:\n{reasons}", where=str(source.folder))
    cached = cache_folder(source, fingerprint(source.folder), scheme, ())
    folder = cached if cached.is_dir() else copy
    quantize_checkpoint(source, folder, scheme, on_bytes=on_bytes, replace_damaged=True)
    return folder, replace(
        row,
        stored_as=f"{scheme.name}, groups of {scheme.group_size}",
        kept_layers=tuple(f"{layer.layer} ({layer.reason})" for layer in plan.skipped),
    )


def float_type(folder: Path) -> str:
    """The type that most of the checkpoint's bytes have: bfloat16, float32."""
    sizes: dict[str, int] = {}
    for info in read_checkpoint(folder).values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.num_bytes
    name = max(sizes, key=lambda each: sizes[each])
    return {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}.get(name, name)


@contextmanager
def _work_folder() -> Iterator[Path]:
    """A folder beside the quantized copies, gone afterwards; those of killed comparisons go now."""
    root = cache_root()
    with said_clearly(root):
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(".compare-*.tmp"):
            owner = left.name.removeprefix(".compare-").removesuffix(".tmp")
            if owner.isdigit() and not psutil.pid_exists(int(owner)):
                remove_folder(left)
        folder = root / f".compare-{os.getpid()}.tmp"
        remove_folder(folder)
        folder.mkdir()
    try:
        yield folder
    finally:
        remove_folder(folder)
