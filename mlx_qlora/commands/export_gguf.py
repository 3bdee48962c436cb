"""``mlx-qlora export-gguf``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mlx_qlora.commands.output import Json, gigabytes, on_bytes, print_json, say
from mlx_qlora.errors import ConfigError


def export_gguf(
    output: Annotated[Path, typer.Option(help="The .gguf file to write.")],
    model: Annotated[
        str | None,
        typer.Argument(help="Hub id or folder: 16-bit, quantized or fused. With an adapter: its base."),
    ] = None,
    adapter_path: Annotated[
        Path | None, typer.Option(help="Write this adapter, for llama.cpp's --lora, instead of a model.")
    ] = None,
    type_name: Annotated[
        str,
        typer.Option("--type", help="auto, f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0."),
    ] = "auto",
    pre: Annotated[
        str | None, typer.Option(help="How llama.cpp splits text for this tokenizer, if that is not known.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What the model is called in the file.")] = None,
    license_name: Annotated[
        str | None, typer.Option("--license", help="Its licence; that of its README.md if not given.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Allow the model folder's own code.")] = False,
    as_json: Json = False,
) -> None:
    """Write a model, or an adapter alone, as a GGUF file for llama.cpp, tensor by tensor, in little memory.

    Example: mlx-qlora export-gguf models/mistral-int4 --output mistral-int4.gguf

    Example: mlx-qlora export-gguf --adapter-path adapters/club --output club.gguf

    With --type auto int4 becomes Q4_1 and int5 Q5_1 with the very same numbers; 16-bit floats stay as they
    are. What could not stay is said, with the measured error. The file appears when it is whole.
    """
    if model is None and adapter_path is None:
        raise ConfigError(
            "There is neither a model nor an adapter to export.",
            run="mlx-qlora export-gguf MODEL --output FILE.gguf   # or --adapter-path A",
        )
    if adapter_path is not None:
        _adapter(adapter_path, output, model, type_name, name, revision, trust_remote_code, as_json)
        return
    from mlx_qlora.exchange.gguf_export import by_class
    from mlx_qlora.exchange.gguf_export import export_gguf as export
    from mlx_qlora.memory.monitor import MemoryMonitor

    monitor = MemoryMonitor()
    result = export(
        str(model),
        output,
        type_name=type_name,
        pre=pre,
        name=name,
        license_name=license_name,
        revision=revision,
        trust_remote_code=trust_remote_code,
        on_bytes=on_bytes("Exporting"),
    )
    monitor.sample()
    if as_json:
        print_json({**asdict(result), "peak_memory_bytes": monitor.peak_footprint_bytes})
        return
    say(f"{result.num_parameters / 1e6:.1f} M parameters, {result.bits_per_weight:.3f} bits per weight")
    say(f"{gigabytes(result.bytes)} in {result.path}, {result.seconds:.0f} s")
    for (stored, gguf_type, is_exact), tensors in by_class(result.tensors).items():
        worst = max(tensor.relative_error for tensor in tensors)
        what = "the same numbers" if is_exact else f"relative error at most {worst:.1e}"
        say(f"{stored} as {gguf_type}, {what}: {len(tensors)} tensors")
    for tensor in result.tensors:
        if tensor.reason is not None:
            say(f"{tensor.name} as {tensor.gguf_type}: {tensor.reason}")
    for note in result.notes:
        say(f"note: {note}")
    say(f"Run: llama-cli -m {result.path}")


def _adapter(
    adapter_path: Path,
    output: Path,
    model: str | None,
    type_name: str,
    name: str | None,
    revision: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    from mlx_qlora.exchange.gguf_adapter import export_gguf_adapter

    result = export_gguf_adapter(
        adapter_path,
        output,
        model=model,
        type_name=type_name,
        name=name,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print_json(asdict(result))
        return
    say(f"{result.layers} layers, rank {result.rank}, alpha {result.alpha:g}, as {result.gguf_type}")
    say(f"{gigabytes(result.bytes)} in {result.path}")
    for note in result.notes:
        say(f"note: {note}")
    say(f"Run: mlx-qlora export-gguf {result.base_model} --output BASE.gguf   # if you have no GGUF of it")
    say(f"Run: llama-cli -m BASE.gguf --lora {result.path}")
