"""Quantize a checkpoint as a stream: some rows are read, quantized, written and forgotten."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial as partial_function
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from mlx_qlora.errors import ModelError, StorageError
from mlx_qlora.quantization.nf4 import is_double, quantize_absmax
from mlx_qlora.quantization.nf4_layers import quantized
from mlx_qlora.quantization.policy import Recipe
from mlx_qlora.quantization.schemes import Scheme
from mlx_qlora.storage import (
    read_json,
    said_clearly,
    sha256_of,
    sweep,
    sync_folder,
    write_json,
)
from mlx_qlora.weights.output_folder import MANIFEST, copy_small_files, is_finished, locked, make_way
from mlx_qlora.weights.plan import Job, QuantizationPlan, SkippedLayer, plan_quantization
from mlx_qlora.weights.shards import INDEX
from mlx_qlora.weights.source import ModelSource, fingerprint

FORMAT_VERSION = 1
BLOCK_BYTES = 32 * 1024**2
"""Rows are read in blocks of about this many bytes: what bounds memory."""

CODEBOOK_WORK = 8
"""NF4 takes so much more memory a weight while it is made."""

SHARD_BYTES = 1024**3
SPARE_BYTES = 64 * 1024**2

OnBytes = Callable[[int, int], None]


@dataclass(frozen=True)
class QuantizeResult:
    """A quantized model folder."""

    path: Path
    bits_per_weight: float
    """All stored bytes, scales and unquantized tensors included."""
    bytes: int
    skipped: tuple[SkippedLayer, ...]
    num_parameters: int
    seconds: float


def quantize_checkpoint(
    source: ModelSource,
    output: Path,
    scheme: Recipe | Scheme,
    skip_modules: Sequence[str] = (),
    on_bytes: OnBytes | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    replace_damaged: bool = False,
) -> QuantizeResult:
    """Write a quantized copy of `source` to `output`, in mlx-lm's layout; NF4, which it has not, in our own.

    Killed at any moment, it goes on where it was: finished shards are kept in ``<output>.partial`` and
    believed only when their checksum is right. The folder appears under its own name when it is whole.

    Args:
        on_bytes: Called with (bytes read, bytes to read).
        shard_bytes: Size at which a new file is begun.
        replace_damaged: Make `output` anew if it is not whole; for folders that are ours alone.

    Raises:
        ModelError: `source` is quantized already.
        WeightsError: its weights are broken or do not fit its configuration.
        StorageError: the disk has no room, or `output` holds something else.
    """
    started, output = time.perf_counter(), output.resolve()
    if source.is_quantized:
        raise ModelError(
            "This model is quantized already; quantizing twice only loses precision.",
            where=str(source.folder),
            run=f"mlx-qlora train --model {source.name} …   # takes it as it is",
        )
    identity = fingerprint(source.folder)
    plan = plan_quantization(source, scheme, skip_modules, shard_bytes)
    digest = plan.digest(identity)
    with locked(output):
        if not is_finished(output, digest):
            make_way(output, replace_damaged)
            manifest = {"plan": digest, "source_fingerprint": identity, "skip_modules": list(skip_modules)}
            _write(source, plan, output, manifest, on_bytes)
    return QuantizeResult(
        path=output,
        bits_per_weight=plan.output_bytes * 8 / plan.num_parameters,
        bytes=plan.output_bytes,
        skipped=plan.skipped,
        num_parameters=plan.num_parameters,
        seconds=time.perf_counter() - started,
    )


def _write(
    source: ModelSource,
    plan: QuantizationPlan,
    output: Path,
    manifest: dict[str, Any],
    on_bytes: OnBytes | None,
) -> None:
    partial = output.with_name(f"{output.name}.partial")
    with said_clearly(partial):
        manifest = _opened(partial, manifest)
        _check_room(plan, partial, manifest)
        done = 0
        for index, jobs in enumerate(plan.shards):
            name = plan.shard_name(index)
            if name not in manifest["shards"]:
                write_shard(partial / name, jobs, partial_function(_tell, on_bytes, plan, done))
                entry = {"bytes": (partial / name).stat().st_size, "sha256": sha256_of(partial / name)}
                manifest["shards"][name] = entry
                write_json(partial / MANIFEST, manifest)
            done += sum(job.num_bytes for job in jobs)
            _tell(on_bytes, plan, done, 0)
        small_files = _write_small_files(source, plan, partial)
        skipped = [{"layer": layer.layer, "reason": layer.reason} for layer in plan.skipped]
        finished = {
            **manifest,
            "shards": dict(sorted(manifest["shards"].items())),
            "finished": True,
            "source": source.name,
            "revision": source.revision,
            "scheme": plan.config["quantization"],
            "skipped": skipped,
            "files": small_files,
        }
        write_json(partial / MANIFEST, finished)
        sync_folder(partial)
        partial.rename(output)
        sync_folder(output.parent)


def write_shard(path: Path, jobs: Sequence[Job], on_read: Callable[[int], None]) -> None:
    """Write one safetensors file whose header is known before its data."""
    temporary = path.with_name(f".{path.name}.tmp")
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offsets: dict[str, int] = {}
    position = 0
    for job in jobs:
        for output in job.outputs:
            end = position + output.num_bytes
            entry = {"dtype": output.dtype, "shape": list(output.shape), "data_offsets": [position, end]}
            header[output.name], offsets[output.name] = entry, position
            position = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        start, read = file.tell(), 0
        file.truncate(start + position)
        for job in jobs:
            for done in _run(job, file, {name: start + offset for name, offset in offsets.items()}):
                on_read(read + done)
            read += job.num_bytes
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _run(job: Job, file: BinaryIO, offsets: dict[str, int]) -> Iterator[int]:
    """Write a job's outputs block by block; yields the bytes read so far."""
    row_bytes = max(job.num_bytes // max(job.rows, 1), 1)
    is_codebook = job.scheme is not None and job.scheme.is_codebook
    block = max(1, BLOCK_BYTES // (CODEBOOK_WORK if is_codebook else 1) // row_bytes)
    position = {output.name: offsets[output.name] for output in job.outputs}
    kept: list[mx.array] = []
    for first in range(0, job.rows, block):
        last = min(first + block, job.rows)
        parts = _parts(job.read(first, last).astype(job.dtype), job.scheme)
        mx.eval(parts)
        if job.scheme is not None and is_double(job.scheme.mode):
            parts = (parts[0], *_kept_for_last(kept, parts[1], is_last=last == job.rows))
        for output, part in zip(job.outputs, parts, strict=False):
            data = raw_bytes(part)
            file.seek(position[output.name])
            file.write(data)
            position[output.name] += len(data)
        yield last * row_bytes
    if job.rows == 0:
        yield 0


def _parts(x: mx.array, scheme: Scheme | None) -> tuple[mx.array, ...]:
    """What is stored of some rows; of double quantization the first one only."""
    if scheme is None:
        return (x,)
    if scheme.is_codebook:
        return tuple(quantized(x, scheme.group_size, scheme.mode.removesuffix("-dq")).values())
    return tuple(mx.quantize(x, scheme.group_size, scheme.bits, mode=scheme.mode))


def _kept_for_last(kept: list[mx.array], absmax: mx.array, *, is_last: bool) -> tuple[mx.array, ...]:
    """The second quantization needs the mean of all: nothing until the last rows, then all of it."""
    kept.append(absmax.reshape(-1))
    if not is_last:
        return ()
    double = quantize_absmax(mx.concatenate(kept))
    mx.eval(double)
    return double


def raw_bytes(array: mx.array) -> bytes:
    """The array's bytes in row-major order; NumPy has no bfloat16, so types are seen as integers."""
    unsigned = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[array.dtype.size]
    flat = array.reshape(-1)
    return np.array(flat.astype(mx.uint8) if array.dtype == mx.bool_ else flat.view(unsigned)).tobytes()


def _opened(partial: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest of an interrupted run of the same plan, its shards verified; or a fresh folder."""
    try:
        before = read_json(partial / MANIFEST)
        if before["plan"] == manifest["plan"]:
            good = {n: e for n, e in before["shards"].items() if _is_sound(partial / n, e["sha256"])}
            sweep(partial)
            return {"format_version": FORMAT_VERSION, **manifest, "shards": good}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return {"format_version": FORMAT_VERSION, **manifest, "shards": {}}


def _is_sound(shard: Path, digest: str) -> bool:
    return shard.is_file() and sha256_of(shard) == digest


def _check_room(plan: QuantizationPlan, partial: Path, manifest: dict[str, Any]) -> None:
    there = sum(entry["bytes"] for entry in manifest["shards"].values())
    needed = plan.output_bytes - there + SPARE_BYTES
    free = shutil.disk_usage(partial).free
    if free < needed:
        raise StorageError(
            f"The disk has {free / 1e9:.2f} GB free, and {needed / 1e9:.2f} GB are needed.",
            where=str(partial),
            run="make room, or choose another --output; then run the same command again",
        )


def _write_small_files(source: ModelSource, plan: QuantizationPlan, partial: Path) -> dict[str, str]:
    """Tokenizer, templates, config.json and index; the digest of each."""
    ours = ("config.json", INDEX)
    copied = copy_small_files(source.folder, partial)
    from mlx_lm.utils import _encode_tagged_floats

    write_json(partial / "config.json", _encode_tagged_floats(plan.config))
    weight_map = {
        output.name: plan.shard_name(index)
        for index, jobs in enumerate(plan.shards)
        for job in jobs
        for output in job.outputs
    }
    metadata = {"total_size": plan.output_bytes, "total_parameters": plan.num_parameters}
    write_json(partial / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
    return {name: sha256_of(partial / name) for name in (*ours, *(path.name for path in copied))}


def _tell(on_bytes: OnBytes | None, plan: QuantizationPlan, before: int, read: int) -> None:
    if on_bytes is not None:
        on_bytes(before + read, plan.input_bytes)
