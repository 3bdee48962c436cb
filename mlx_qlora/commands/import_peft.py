"""``mlx-qlora import-peft``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mlx_qlora.commands.output import Json, print_json, say
from mlx_qlora.config import build_config


def import_peft(
    folder: Annotated[Path, typer.Argument(help="Folder of a PEFT adapter.")],
    output: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder of its base model; the one it names if none.")
    ] = None,
    scheme: Annotated[
        str, typer.Option(help="How the base is to be quantized where the adapter is used: int4, int8, none.")
    ] = "none",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of --model.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Allow the model folder's own code.")] = False,
    as_json: Json = False,
) -> None:
    """Make an adapter for MLX of a PEFT adapter: LoRA, rsLoRA or DoRA, number for number.

    Example: mlx-qlora import-peft downloads/my-lora --output adapters/my-lora --model models/mistral

    The result runs here and in mlx-lm. What has no like here is refused by its name: rank_pattern,
    modules_to_save, biases and other kinds of adapters.
    """
    from mlx_qlora.exchange.peft import import_peft as import_folder

    quantization = build_config({"quantization": {"scheme": scheme}}, where="command line").quantization
    result = import_folder(
        folder,
        output,
        model=model,
        revision=revision,
        quantization=quantization,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print_json({**asdict(result), "lora": result.lora.model_dump(mode="json")})
        return
    lora = result.lora
    say(f"{lora.variant}, rank {lora.rank}, alpha {lora.alpha:g}, on {result.num_adapted} layers")
    for note in result.notes:
        say(note)
    say(f'Run: mlx-qlora infer "…" --adapter-path {output}')
