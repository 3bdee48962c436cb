"""``mlx-qlora export-peft``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mlx_qlora.commands.output import Json, print_json, say


def export_peft(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter.")],
    output: Annotated[Path, typer.Option(help="Folder for the PEFT adapter.")],
    model: Annotated[
        str | None,
        typer.Option(help="The base PEFT puts it on; the adapter's own if none."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of --model.")] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Go on although --model has other weights."),
    ] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Allow the model folder's own code.")] = False,
    as_json: Json = False,
) -> None:
    """Make a PEFT adapter of an adapter: LoRA, rsLoRA or DoRA, number for number.

    Example: mlx-qlora export-peft adapters/farense --output peft/farense

    The result loads with peft.PeftModel.from_pretrained(base, "peft/farense"). An adapter trained on a
    quantized base is put on the 16-bit one, as PEFT does with QLoRA.
    """
    from mlx_qlora.exchange.peft import export_peft as export_folder

    result = export_folder(
        adapter, output, model=model, revision=revision, force=force, trust_remote_code=trust_remote_code
    )
    if as_json:
        print_json({**asdict(result), "lora": result.lora.model_dump(mode="json")})
        return
    lora = result.lora
    say(f"{lora.variant}, rank {lora.rank}, on {result.num_adapted} layers of {result.base_model}")
    for note in result.notes:
        say(note)
    say(f'In Python: peft.PeftModel.from_pretrained(model, "{output}")')
