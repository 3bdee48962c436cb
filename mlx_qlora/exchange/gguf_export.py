"""A model folder as one GGUF file for llama.cpp, tensor by tensor, in little memory."""

from __future__ import annotations

import glob
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import gguf

from mlx_qlora.errors import ConfigError, ModelError, StorageError
from mlx_qlora.exchange.gguf_card import general_metadata
from mlx_qlora.exchange.gguf_layout import layout_of
from mlx_qlora.exchange.gguf_metadata import describe
from mlx_qlora.exchange.gguf_plan import AUTO, Planned, asked_type, plan_tensors
from mlx_qlora.exchange.gguf_rows import Loss, encoded_rows
from mlx_qlora.exchange.gguf_vocabulary import check_name, vocabulary_of
from mlx_qlora.exchange.gguf_weights import parameters
from mlx_qlora.exchange.gguf_writer import GgufEntry, encode_header, padded, write_data
from mlx_qlora.storage import write_file
from mlx_qlora.weights.gguf_tensors import Type
from mlx_qlora.weights.output_folder import locked
from mlx_qlora.weights.source import ModelSource, resolve_model
from mlx_qlora.weights.stream import SPARE_BYTES, OnBytes

_FILE_TYPES = {
    Type.F32: gguf.LlamaFileType.ALL_F32,
    Type.F16: gguf.LlamaFileType.MOSTLY_F16,
    Type.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    Type.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    Type.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
    Type.Q5_0: gguf.LlamaFileType.MOSTLY_Q5_0,
    Type.Q5_1: gguf.LlamaFileType.MOSTLY_Q5_1,
    Type.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    Type.MXFP4: gguf.LlamaFileType.MOSTLY_MXFP4_MOE,
}


@dataclass(frozen=True)
class ExportedTensor:
    """What became of one parameter."""

    name: str
    gguf_name: str
    stored: str
    """How it lay in the model's files."""
    gguf_type: str
    is_exact: bool
    """Whether every number is the same, in float32."""
    relative_error: float
    """Root of the squared changes over that of the squared weights; 0 where exact."""
    largest_error: float
    """The largest change of one weight."""
    reason: str | None
    """Why it is not of the type that was asked for."""


@dataclass(frozen=True)
class GgufExport:
    """A GGUF file."""

    path: Path
    architecture: str
    file_type: str
    """What most of the weights are."""
    bits_per_weight: float
    """All stored bytes of tensors, scales included."""
    bytes: int
    num_parameters: int
    tensors: tuple[ExportedTensor, ...]
    notes: tuple[str, ...]
    """What llama.cpp does otherwise."""
    seconds: float


def export_gguf(
    model: str | Path,
    output: Path,
    *,
    type_name: str = AUTO,
    pre: str | None = None,
    name: str | None = None,
    license_name: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_bytes: OnBytes | None = None,
) -> GgufExport:
    """Write a model, 16-bit, quantized or fused, as a GGUF file; it appears under its name when it is whole.

    With ``auto`` floats keep their type. Affine codes go over as they are into the smallest of Q4_0, Q4_1,
    Q5_0, Q5_1 and Q8_0 that keeps every number; where float16 scales cannot, into the smallest that has room
    for them. If the scales' rounding were more than a quarter of the error the codes made already, six and
    eight bits are quantized anew as Q8_0, fewer become a 16-bit float. mxfp4 becomes MXFP4, any other format
    the 16-bit float that has all its numbers or is nearest. Norms, biases and routers are float32.

    Args:
        type_name: ``auto`` or a type for all matrices: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0.
        pre: llama.cpp's name for how the tokenizer splits text, if its tokens are of no known model.
        name: What the model is called in the file; its own name if not given.
        license_name: Its licence; that of the model's README.md if not given.
        on_bytes: Called with (bytes read, bytes to read).

    Raises:
        ModelError: an architecture, tokenizer or setting that llama.cpp does not have.
        WeightsError: the model's files do not hold together.
        StorageError: the disk has no room, or `output` is there already.
    """
    started, wanted = time.perf_counter(), asked_type(type_name)
    output = checked_output(output)
    source = resolve_model(str(model), revision, trust_remote_code)
    layout = layout_of(source)
    said = describe(layout, str(source.folder / "config.json"))
    planned = plan_tensors(source, layout, wanted)
    vocab_size = _vocab_size(planned, source)
    vocabulary = vocabulary_of(source, layout, vocab_size, pre)
    extra = [GgufEntry(name, Type.F32, array.shape) for name, array in said.tensors.items()]
    entries = [*extra, *(each.entry for each in planned)]
    mostly = _most(planned)
    general = general_metadata(source, layout.architecture, name, license_name)
    check_name(general["general.name"], vocabulary)
    metadata = {
        **general,
        "general.file_type": int(_FILE_TYPES[mostly]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **said.metadata,
        f"{layout.architecture}.vocab_size": vocab_size,
        **vocabulary.metadata,
    }
    header = encode_header(metadata, entries)
    tensors: list[ExportedTensor] = []

    def write(file: BinaryIO) -> None:
        file.write(header)
        for entry in extra:
            write_data(file, entry, iter([said.tensors[entry.name].astype("<f4").tobytes()]))
        tensors.extend(_write_tensors(file, source, planned, on_bytes))

    publish(output, len(header) + sum(padded(entry.num_bytes) for entry in entries), write)
    num_bytes = sum(each.entry.num_bytes for each in planned)
    num_parameters = sum(math.prod(each.entry.shape) for each in planned)
    return GgufExport(
        path=output,
        architecture=layout.architecture,
        file_type=mostly.name,
        bits_per_weight=num_bytes * 8 / num_parameters,
        bytes=output.stat().st_size,
        num_parameters=num_parameters,
        tensors=tuple(tensors),
        notes=(*said.notes, *vocabulary.notes),
        seconds=time.perf_counter() - started,
    )


def checked_output(output: Path) -> Path:
    """The absolute path, if nothing is there.

    Raises:
        ConfigError: it does not end in .gguf.
        StorageError: there is something already.
    """
    output = output.expanduser().resolve()
    if output.suffix != ".gguf":
        raise ConfigError("The file's name has to end in .gguf.", where=str(output))
    if output.exists():
        raise StorageError(
            "There is something here already; nothing was touched.",
            where=str(output),
            run="choose another --output, or remove this one",
        )
    return output


def publish(output: Path, num_bytes: int, write: Callable[[BinaryIO], None]) -> None:
    """Let `write` fill `output`, one process at a time, if the disk has room.

    Raises:
        StorageError: it has not, or another process was faster.
    """
    with locked(output):
        checked_output(output)
        for left_over in output.parent.glob(f".{glob.escape(output.name)}.*.tmp"):
            left_over.unlink(missing_ok=True)  # of a killed export: the lock is ours
        free, needed = shutil.disk_usage(output.parent).free, num_bytes + SPARE_BYTES
        if free < needed:
            raise StorageError(
                f"The disk has {free / 1e9:.2f} GB free, and {needed / 1e9:.2f} GB are needed.",
                where=str(output.parent),
                run="make room, or choose another --output; then run the same command again",
            )
        write_file(output, write)


def _write_tensors(
    file: BinaryIO, source: ModelSource, planned: Sequence[Planned], on_bytes: OnBytes | None
) -> Iterator[ExportedTensor]:
    total, done = sum(each.num_bytes for each in planned), 0
    for each, parameter in zip(planned, parameters(source), strict=True):
        if parameter.name != each.parameter or parameter.num_bytes != each.num_bytes:
            raise ModelError("The model's files were changed while they were read.", where=str(source.folder))
        loss = Loss()
        blocks = encoded_rows(parameter, each, loss)
        write_data(file, each.entry, _told(blocks, on_bytes, done, each.num_bytes, total))
        done += each.num_bytes
        yield ExportedTensor(
            parameter.name,
            each.entry.name,
            parameter.stored,
            each.entry.type.name,
            each.is_exact or loss.largest == 0,
            loss.relative,
            loss.largest,
            each.reason,
        )


def _told(
    blocks: Iterator[tuple[bytes, float]], on_bytes: OnBytes | None, before: int, own: int, total: int
) -> Iterator[bytes]:
    for block, share in blocks:
        yield block
        if on_bytes is not None:
            on_bytes(before + int(share * own), total)


def _most(planned: Sequence[Planned]) -> Type:
    sizes: Counter[Type] = Counter()
    for each in planned:
        sizes[each.entry.type] += math.prod(each.entry.shape)
    return sizes.most_common(1)[0][0]


def _vocab_size(planned: Sequence[Planned], source: ModelSource) -> int:
    for each in planned:
        if each.entry.name == "token_embd.weight":
            return each.entry.shape[0]
    raise ModelError("The model has no embedding.", where=str(source.folder))


def by_class(tensors: Sequence[ExportedTensor]) -> Mapping[tuple[str, str, bool], list[ExportedTensor]]:
    """Tensors by (how they were stored, GGUF type, whether exact), in that order."""
    classes: dict[tuple[str, str, bool], list[ExportedTensor]] = {}
    for tensor in sorted(tensors, key=lambda tensor: (tensor.stored, tensor.gguf_type, not tensor.is_exact)):
        classes.setdefault((tensor.stored, tensor.gguf_type, tensor.is_exact), []).append(tensor)
    return classes
