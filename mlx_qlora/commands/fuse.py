"""``mlx-qlora fuse``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_qlora.commands.output import Json, gigabytes, on_bytes, print_json, say


def fuse(
    adapter_path: Annotated[Path, typer.Option(help="Folder of the adapter.")],
    output: Annotated[Path, typer.Option(help="Folder for the fused model.")],
    model: Annotated[
        str | None,
        typer.Option(help="A copy of the base to fuse into; what the adapter was trained on if none."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Measure on the validation rows of this data, not on a built-in text.")
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Write an unquantized model: the exact sum, rounded once.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of unquantized weights: bfloat16, float16, float32; the model's own if none."),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(help="Another format for the whole model: int8, mxfp4, nf4, … (the base's if none)."),
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="Bits per weight of the whole model: 2, 3, 4, 5, 6, 8.")
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="Inputs that share a scale: 32, 64, 128.")] = None,
    adapted_scheme: Annotated[
        str | None, typer.Option(help="Format of the layers with an update alone: int8, int6-g32, none.")
    ] = None,
    plain_rounding: Annotated[
        bool,
        typer.Option("--plain-rounding", help="MLX's own scales and nearest codes: faster, and loses more."),
    ] = False,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Write the model however much of the adapter is lost.")
    ] = False,
    no_logits: Annotated[
        bool, typer.Option("--no-logits", help="Compare weights alone, in the memory of one layer.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Tokens of --data to measure on, at most.", min=2)] = 1024,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Allow the model folder's own code.")] = False,
    as_json: Json = False,
) -> None:
    """Make one model of a base and its adapter, layer by layer, in little memory.

    Example: mlx-qlora fuse --adapter-path adapters/farense --output models/farense --data data/farense

    What a quantized format loses of the adapter is measured and said before anything is written. Above a
    tenth of what the adapter does (Kullback-Leibler divergence of the answers) it is refused, with ways out.
    """
    from mlx_qlora.exchange.fuse import Measuring
    from mlx_qlora.exchange.fuse import fuse as fuse_model
    from mlx_qlora.exchange.fuse_plan import FuseFormat
    from mlx_qlora.exchange.fuse_report import FuseLoss
    from mlx_qlora.memory.monitor import MemoryMonitor

    form = FuseFormat(
        dequantize=dequantize,
        dtype=dtype,
        quantization=_quantization(scheme, bits, group_size),
        adapted_scheme=adapted_scheme,
        compensate=not plain_rounding,
    )
    monitor = MemoryMonitor()

    def on_loss(loss: FuseLoss) -> None:
        for line in loss_lines(loss):
            say(line)

    result = fuse_model(
        adapter_path,
        output,
        form,
        model=model,
        revision=revision,
        trust_remote_code=trust_remote_code,
        measuring=Measuring(data=data, max_tokens=max_tokens, logits=not no_logits),
        accept_loss=accept_loss,
        on_quantizing=on_bytes("Quantizing"),
        on_loss=on_loss,
        on_bytes=on_bytes("Writing"),
    )
    monitor.sample()
    if as_json:
        print_json(
            {
                "path": result.path,
                "base": result.base,
                "base_folder": result.base_folder,
                "num_fused": result.num_fused,
                "schemes": dict(result.schemes),
                "bytes": result.bytes,
                "bits_per_weight": result.bits_per_weight,
                "loss": result.loss.as_dict(),
                "seconds": result.seconds,
                "peak_memory_bytes": monitor.peak_footprint_bytes,
            }
        )
        return
    formats = ", ".join(f"{count} layers in {name}" for name, count in result.schemes.items())
    say(f"{result.num_fused} layers fused; {formats}; {result.bits_per_weight:.3f} bits per weight")
    say(f"{gigabytes(result.bytes)} in {result.path}, {result.seconds:.0f} s")
    say(f'Run: mlx-qlora infer "…" --model {result.path}')


def loss_lines(loss: Any) -> list[str]:
    """What was measured, for a person.

    Args:
        loss: A FuseLoss.
    """
    weights, logits = loss.weights, loss.logits
    lines = []
    if weights.error is not None:
        lines.append(
            f"weights: the format's error is {weights.error:.3g} times the update; "
            f"{weights.survived:.1%} of the update is in the stored weights"
        )
    if logits is not None:
        where = "validation rows" if loss.is_validation else "the built-in text"
        lines.append(
            f"logits: {logits.relative_error:.2e} relative error, {logits.kl_nats:.2e} nats from base and "
            f"adapter ({logits.num_tokens} tokens of {where})"
        )
        if logits.lost_share is not None:
            lines.append(
                f"lost of what the adapter does: {logits.lost_share:.2%} "
                f"(without it the base is {logits.base_kl_nats:.2e} nats away)"
            )
        if loss.is_validation:
            perplexities = [logits.base_perplexity, logits.adapted_perplexity, logits.fused_perplexity]
            base, adapted, fused = (f"{each:.4f}" for each in perplexities)
            lines.append(f"perplexity: base {base}, with adapter {adapted}, fused {fused}")
    return [*lines, *loss.notes]


def _quantization(scheme: str | None, bits: int | None, group_size: int | None) -> Any:
    if scheme is None and bits is None and group_size is None:
        return None
    from mlx_qlora.config import build_config

    keys: dict[str, Any] = {"scheme": scheme or f"int{bits or 4}", "bits": bits, "group_size": group_size}
    return build_config({"quantization": keys}, where="command line").quantization
