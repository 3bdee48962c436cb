"""``mlx-qlora export-bitsandbytes``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_qlora.commands.output import Json, gigabytes, print_json, say


def export_bitsandbytes(
    model: Annotated[str, typer.Argument(help="A model that was quantized to nf4 or nf4-dq.")],
    output: Annotated[Path, typer.Option(help="Folder for the model.")],
    as_json: Json = False,
) -> None:
    """Write an NF4 model as bitsandbytes stores it, for transformers and PEFT on other machines.

    Example: mlx-qlora export-bitsandbytes models/mistral-nf4 --output models/mistral-bnb

    Codes and scales stay the same to the bit. Embeddings and the output head, which bitsandbytes does not
    quantize, are unpacked to 16 bits.
    """
    from mlx_qlora.weights.bitsandbytes_export import export_bitsandbytes as export
    from mlx_qlora.weights.source import resolve_model

    unpacked = export(resolve_model(model), output)
    num_bytes = sum(path.stat().st_size for path in output.iterdir())
    if as_json:
        print_json({"output": output, "bytes": num_bytes, "unpacked": unpacked})
        return
    say(f"{gigabytes(num_bytes)} in {output}")
    for layer in unpacked:
        say(f"in 16 bits: {layer}")
    say("Run there: AutoModelForCausalLM.from_pretrained(FOLDER)   # needs bitsandbytes")
