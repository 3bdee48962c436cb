"""``mlx-qlora quantize``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mlx_qlora.commands.output import Json, gigabytes, on_bytes, print_json, say
from mlx_qlora.config import build_config
from mlx_qlora.errors import ConfigError


def quantize(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a 16-bit model.")],
    output: Annotated[Path, typer.Option(help="Folder for the quantized model.")],
    scheme: Annotated[str, typer.Option(help="int2 … int8, mxfp4, mxfp8, nvfp4, nf4 or nf4-dq.")] = "int4",
    bits: Annotated[
        int | None, typer.Option(help="Bits per weight: 2, 3, 4, 5, 6 or 8; the scheme's own if not given.")
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="Inputs that share a scale: 32, 64, 128.")] = None,
    mode: Annotated[
        str | None,
        typer.Option(help="affine, mxfp4, mxfp8, nvfp4, nf4 or nf4-dq; the scheme's own if none."),
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="A layer that stays as it is: lm_head.")] = None,
    override: Annotated[
        list[str] | None, typer.Option(help="Another scheme for some layers: '*.down_proj=int8'.")
    ] = None,
    sensitive_scheme: Annotated[
        str | None, typer.Option(help="Scheme of the layers known to suffer most: int6, int8.")
    ] = None,
    bits_per_weight: Annotated[
        float | None,
        typer.Option(help="Choose each layer's scheme by its measured error, for so many at most."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="With --bits-per-weight: data by which layers are judged, by the model's answers."),
    ] = None,
    keep_lm_head: Annotated[
        bool, typer.Option("--keep-lm-head", help="Leave the output head as it is.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Allow the model folder's own code.")] = False,
    as_json: Json = False,
) -> None:
    """Turn a 16-bit checkpoint into a quantized one, tensor by tensor, in little memory.

    Example: mlx-qlora quantize mistralai/Mistral-7B-v0.1 --output models/mistral-int4 --bits 4

    Killed or interrupted, the same command goes on where it was. The result loads in mlx-lm too, but for
    nf4 and nf4-dq: bitsandbytes' formats, which only mlx-qlora runs on MLX.
    """
    from mlx_qlora.api import quantize as quantize_model
    from mlx_qlora.memory.monitor import MemoryMonitor

    keys = {
        "scheme": scheme,
        "bits": bits,
        "group_size": group_size,
        "mode": mode,
        "skip_modules": skip or [],
        "overrides": dict(_pair(each) for each in override or []),
        "sensitive_scheme": sensitive_scheme,
        "bits_per_weight": bits_per_weight,
        "keep_lm_head": keep_lm_head,
    }
    config = build_config({"quantization": keys}, where="command line").quantization
    monitor = MemoryMonitor()
    result = quantize_model(
        model,
        output,
        config,
        calibration=calibration,
        revision=revision,
        trust_remote_code=trust_remote_code,
        on_bytes=on_bytes("Quantizing"),
    )
    monitor.sample()
    if as_json:
        print_json({**asdict(result), "output": output, "peak_memory_bytes": monitor.peak_footprint_bytes})
        return
    say(f"{result.num_parameters / 1e6:.1f} M parameters, {result.bits_per_weight:.3f} bits per weight")
    say(f"{gigabytes(result.bytes)} in {output}, {result.seconds:.0f} s")
    for layer in result.skipped:
        say(f"kept as it is: {layer.layer} ({layer.reason})")
    say(f"Run: mlx-qlora train --model {output} --data D --adapter-path adapters/NAME")


def _pair(text: str) -> tuple[str, str]:
    pattern, separator, scheme = text.rpartition("=")
    if not separator or not pattern or not scheme:
        raise ConfigError(
            f"--override takes PATTERN=SCHEME, not {text!r}.",
            run="mlx-qlora quantize MODEL --override '*.down_proj=int8' --output DIR",
        )
    return pattern, scheme
