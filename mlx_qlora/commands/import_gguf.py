"""``mlx-qlora import-gguf``."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mlx_qlora.commands.output import Json, gigabytes, on_bytes, print_json, say


def import_gguf(
    file: Annotated[str, typer.Argument(help="A .gguf file, or OWNER/NAME:FILE.gguf on the hub.")],
    output: Annotated[Path, typer.Option(help="Folder for the model.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    as_json: Json = False,
) -> None:
    """Make a model folder of a GGUF file, tensor by tensor, in little memory.

    Example: mlx-qlora import-gguf mistral-7b-v0.1.Q4_K_M.gguf --output models/mistral-q4

    Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and floats keep their very numbers. Any other format is
    quantized anew in 8 bits, and each such tensor is named. The result trains, and loads in mlx-lm too.
    """
    from mlx_qlora.memory.monitor import MemoryMonitor
    from mlx_qlora.weights.gguf import import_gguf as import_file
    from mlx_qlora.weights.source import resolve_gguf

    monitor = MemoryMonitor()
    path, name = resolve_gguf(file, revision)
    result = import_file(path, output, on_bytes("Importing"), name=name)
    monitor.sample()
    if as_json:
        print_json({**asdict(result), "output": output, "peak_memory_bytes": monitor.peak_footprint_bytes})
        return
    say(f"{result.num_parameters / 1e6:.1f} M parameters, {result.bits_per_weight:.3f} bits per weight")
    say(f"{gigabytes(result.bytes)} in {output}, {result.seconds:.0f} s")
    kept = Counter((tensor.gguf_type, tensor.stored) for tensor in result.tensors if tensor.is_exact)
    for (gguf_type, stored), count in sorted(kept.items()):
        say(f"{gguf_type} as {stored}, the same numbers: {count} tensors")
    for tensor in result.tensors:
        if not tensor.is_exact:
            say(f"quantized anew: {tensor.name} ({tensor.gguf_type} as {tensor.stored})")
    say(f"Run: mlx-qlora train --model {output} --data D --adapter-path adapters/NAME")
