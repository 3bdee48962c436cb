"""GGUF files as models: any tensor by name, or the whole file imported into a folder like any other."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qlora.errors import ModelError, StorageError
from mlx_qlora.storage import new_folder, read_json, sha256_of, write_file, write_json
from mlx_qlora.weights.gguf_config import config_of
from mlx_qlora.weights.gguf_convert import BeyondHalfError, blocks, needs_wide_scales, write_shard
from mlx_qlora.weights.gguf_file import GgufFile, read_gguf
from mlx_qlora.weights.gguf_model import Target, map_tensors
from mlx_qlora.weights.gguf_tensors import GROUP_SIZE, can_dequantize, dequantize
from mlx_qlora.weights.gguf_tokenizer import write_tokenizer
from mlx_qlora.weights.output_folder import MANIFEST, is_finished, locked, make_way
from mlx_qlora.weights.plan import skeleton
from mlx_qlora.weights.shards import INDEX
from mlx_qlora.weights.source import ModelSource
from mlx_qlora.weights.stream import FORMAT_VERSION, SHARD_BYTES, SPARE_BYTES, OnBytes


@dataclass(frozen=True)
class ImportedTensor:
    """What became of one parameter."""

    name: str
    gguf_name: str
    gguf_type: str
    stored: str
    is_exact: bool
    """Whether every number is what the file says, or was rounded anew."""


@dataclass(frozen=True)
class GgufImport:
    """A model folder made from a GGUF file."""

    path: Path
    architecture: str
    bits_per_weight: float
    """All stored bytes, scales and unquantized tensors included."""
    bytes: int
    num_parameters: int
    tensors: tuple[ImportedTensor, ...]
    seconds: float


class GgufTensors(Mapping[str, np.ndarray]):
    """Tensors by their GGUF names; each is read and dequantized when it is asked for, and not kept."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor as float32, row-major."""
        tensor = self._file.tensors[name]
        if not can_dequantize(tensor.type):
            raise ModelError(
                f"{name} is of type {tensor.type.name}, which cannot be read.", where=str(tensor.file)
            )
        values, row = np.empty((tensor.rows, tensor.shape[-1]), np.float32), 0
        for raw, _ in blocks(tensor, 0, tensor.rows):
            values[row : row + len(raw)] = dequantize(raw, tensor.type)
            row += len(raw)
        return values.reshape(tensor.shape)

    def __iter__(self) -> Iterator[str]:
        """Names as they stand in the file."""
        return iter(self._file.tensors)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._file.tensors)


@dataclass(frozen=True)
class OpenGguf:
    """A GGUF file to look into."""

    metadata: Mapping[str, Any]
    tensors: GgufTensors


def open_gguf(path: str | Path) -> OpenGguf:
    """Open a GGUF file; its header is read and checked, its tensors are not in memory.

    Raises:
        ModelError: it is no GGUF file, or a truncated or damaged one.
    """
    file = read_gguf(Path(path).expanduser())
    return OpenGguf(file.metadata, GgufTensors(file))


def is_imported(folder: Path) -> bool:
    """Whether an import into `folder` was finished and its files are all there."""
    try:
        return is_finished(folder, str(read_json(folder / MANIFEST)["plan"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def import_gguf(
    path: Path,
    output: Path,
    on_bytes: OnBytes | None = None,
    *,
    name: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    replace_damaged: bool = False,
) -> GgufImport:
    """Make a model folder in mlx-lm's layout of a GGUF file, block of rows by block of rows.

    Formats that are affine over 32 weights keep their very numbers; floats stay as they are; any other format
    is dequantized and quantized anew in 8 bits. The folder appears under its name when it is whole.

    Args:
        on_bytes: Called with (bytes read, bytes to read).
        name: What the model is called in the folder's manifest; the file's path if not given.
        shard_bytes: Size at which a new file is begun.
        replace_damaged: Make `output` anew if it is not whole; for folders that are ours alone.

    Raises:
        ModelError: the file is damaged, or of a kind that cannot be imported.
        StorageError: the disk has no room, or `output` holds something else.
    """
    started, output = time.perf_counter(), output.resolve()
    file = read_gguf(path)
    source = ModelSource(path.parent, name or str(path.resolve()), None, config_of(file))
    targets = map_tensors(file, skeleton(source), source.config)
    plan = _Plan(file, source, targets, shard_bytes, file.fingerprint())
    with locked(output):
        if is_finished(output, plan.digest):
            plan = plan.widened(read_json(output / MANIFEST).get("float32_scales", []))
        else:
            make_way(output, replace_damaged)
            plan = _write_somehow(plan, output, on_bytes)
    return GgufImport(
        path=output,
        architecture=str(source.config["model_type"]),
        bits_per_weight=plan.output_bytes * 8 / plan.num_parameters,
        bytes=plan.output_bytes,
        num_parameters=plan.num_parameters,
        tensors=tuple(_imported(target) for target in plan.targets),
        seconds=time.perf_counter() - started,
    )


class _Plan:
    """What will be written, known before the first block is read."""

    def __init__(
        self,
        file: GgufFile,
        source: ModelSource,
        targets: Sequence[Target],
        shard_bytes: int,
        fingerprint: str,
        wide: tuple[str, ...] = (),
    ) -> None:
        self.file, self.source, self.shard_bytes, self.wide = file, source, shard_bytes, wide
        self.targets = sorted(targets, key=lambda target: target.name)
        self.shards = _in_shards(self.targets, shard_bytes)
        self.config = _config(source.config, self.targets)
        self.fingerprint = fingerprint
        self.input_bytes = sum(target.num_bytes for target in self.targets)
        self.output_bytes = sum(out.num_bytes for target in self.targets for out in target.outputs)
        self.num_parameters = sum(math.prod(target.shape) for target in self.targets)

    @property
    def digest(self) -> str:
        """Changes when anything about the result would; the width of scales follows from the file."""
        layout = [[target.name, target.bits, self.shard_bytes] for target in self.targets]
        text = json.dumps([self.fingerprint, layout, self.config], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def shard_name(self, index: int) -> str:
        """File name of a shard, as mlx-lm names it."""
        count = len(self.shards)
        return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"

    def widened(self, names: Collection[str]) -> _Plan:
        """The same, with float32 scales for the named parameters."""
        targets = [target.with_wide_scales() if target.name in names else target for target in self.targets]
        return _Plan(self.file, self.source, targets, self.shard_bytes, self.fingerprint, tuple(names))


def _write_somehow(plan: _Plan, output: Path, on_bytes: OnBytes | None) -> _Plan:
    """Write with float16 scales; where a tensor turns out to need wider ones, once more with those."""
    try:
        _write(plan, output, on_bytes)
    except BeyondHalfError:
        plan = plan.widened([target.name for target in plan.targets if needs_wide_scales(target)])
        _write(plan, output, on_bytes)
    return plan


def _write(plan: _Plan, output: Path, on_bytes: OnBytes | None) -> None:
    _sweep(output)
    with new_folder(output) as folder:
        _check_room(plan, folder)
        files = write_tokenizer(plan.file, folder)
        shards, done = {}, 0
        for index, targets in enumerate(plan.shards):
            shard = folder / plan.shard_name(index)

            def on_read(read: int, before: int = done) -> None:
                if on_bytes is not None:
                    on_bytes(before + read, plan.input_bytes)

            write_file(shard, partial(write_shard, targets=targets, on_read=on_read))
            shards[shard.name] = {"bytes": shard.stat().st_size, "sha256": sha256_of(shard)}
            done += sum(target.num_bytes for target in targets)
        write_json(folder / "config.json", plan.config)
        weight_map = {
            out.name: plan.shard_name(index)
            for index, targets in enumerate(plan.shards)
            for target in targets
            for out in target.outputs
        }
        metadata = {"total_size": plan.output_bytes, "total_parameters": plan.num_parameters}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})
        manifest = {
            "format_version": FORMAT_VERSION,
            "plan": plan.digest,
            "source_fingerprint": plan.fingerprint,
            "source": plan.source.name,
            "revision": None,
            "scheme": plan.config.get("quantization"),
            "float32_scales": list(plan.wide),
            "tensors": [asdict(_imported(target)) for target in plan.targets],
            "shards": shards,
            "files": {name: sha256_of(folder / name) for name in ("config.json", INDEX, *files)},
            "finished": True,
        }
        write_json(folder / MANIFEST, manifest)


def _sweep(output: Path) -> None:
    """Remove what a killed import of the same output left; the caller holds its lock."""
    for left_over in output.parent.glob(f".{glob.escape(output.name)}.*.tmp"):
        shutil.rmtree(left_over, ignore_errors=True)


def _check_room(plan: _Plan, folder: Path) -> None:
    free, needed = shutil.disk_usage(folder).free, plan.output_bytes + SPARE_BYTES
    if free < needed:
        raise StorageError(
            f"The disk has {free / 1e9:.2f} GB free, and {needed / 1e9:.2f} GB are needed.",
            where=str(folder.parent),
            run="make room, or choose another --output; then run the same command again",
        )


def _in_shards(targets: Sequence[Target], shard_bytes: int) -> list[list[Target]]:
    shards: list[list[Target]] = []
    room = 0
    for target in targets:
        size = sum(out.num_bytes for out in target.outputs)
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(target)
        room -= size
    return shards


def _config(config: Mapping[str, Any], targets: Sequence[Target]) -> dict[str, Any]:
    """With the quantization of each layer, in the form mlx-lm loads."""
    bits = {target.name.removesuffix(".weight"): target.bits for target in targets if target.bits}
    sizes: Counter[int] = Counter()
    for target in targets:
        if target.bits:
            sizes[target.bits] += math.prod(target.shape)
    if not sizes:
        return dict(sorted(config.items()))
    most = {"group_size": GROUP_SIZE, "bits": sizes.most_common(1)[0][0], "mode": "affine"}
    layers = {path: {**most, "bits": own} for path, own in sorted(bits.items())}
    quantization = {**most, **layers}
    return dict(sorted({**config, "quantization": quantization, "quantization_config": quantization}.items()))


def _imported(target: Target) -> ImportedTensor:
    tensor = target.parts[0].tensor
    stored = target.dtype
    if target.bits is not None:
        stored = f"affine {target.bits}-bit, groups of {GROUP_SIZE}, {target.dtype} scales"
    return ImportedTensor(target.name, tensor.name, tensor.type.name, stored, target.is_exact)
