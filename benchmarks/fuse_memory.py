"""Peak memory and time of fusing an adapter: ours, and mlx-lm's.

    python benchmarks/fuse_memory.py --gigabytes 3

A bfloat16 Llama of about that size is made in a temporary folder, quantized to int4 and given an adapter of
random numbers on all linear layers; all of it is removed at the end. Each run is a process of its own; they
alternate. Both sides write the same two models: dequantized in bfloat16, and int4 again. Peak memory is the
kernel's ru_maxrss of that process, which counts file-backed pages too. Ours also measures what is lost, on
the built-in text, which mlx-lm does not; "weights alone" leaves the logits out.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from pairing import finished
from quantize_memory import generate, size_of
from rich.console import Console
from rich.table import Table

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OURS = (
    "from mlx_qlora.__main__ import load_command, run; import sys; "
    "sys.exit(run(load_command('fuse'), sys.argv[1:]))"
)


def main(
    gigabytes: Annotated[float, typer.Option(help="Size of the bfloat16 checkpoint, in 10^9 bytes.")] = 3.0,
    rank: Annotated[int, typer.Option(help="Of the adapter.")] = 16,
    repetitions: Annotated[int, typer.Option(help="Runs of each; the table has their medians.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Measure both, print peaks and their ratios."""
    with tempfile.TemporaryDirectory(prefix="fuse_memory_") as temporary:
        result = measure(Path(temporary), gigabytes, rank, repetitions)
    if as_json:
        print(json.dumps(result))
    else:
        print_table(result)


def measure(folder: Path, gigabytes: float, rank: int, repetitions: int) -> dict:
    """Run everything; medians over the repetitions, and ratios to mlx-lm's run of the same output."""
    base, adapter, output = folder / "int4", folder / "adapter", folder / "fused"
    finished([sys.executable, __file__, "prepare", str(folder), str(gigabytes), str(rank)])
    ours = [
        sys.executable,
        "-c",
        OURS,
        "--adapter-path",
        str(adapter),
        "--output",
        str(output),
        "--accept-loss",
    ]
    theirs = [sys.executable, "-m", "mlx_lm", "fuse", "--model", str(base), "--adapter-path", str(adapter),
              "--save-path", str(output)]  # fmt: skip
    commands = {
        "imports only": [sys.executable, "-c", "import mlx.core, mlx_lm.fuse"],
        "mlx-lm, bfloat16": [*theirs, "--dequantize"],
        "ours, bfloat16": [*ours, "--dequantize"],
        "ours, bfloat16, weights alone": [*ours, "--dequantize", "--no-logits"],
        "mlx-lm, int4": theirs,
        "ours, int4": ours,
        "ours, int4, plain, weights alone": [*ours, "--plain-rounding", "--no-logits"],
    }
    runs: dict[str, list] = {name: [] for name in commands}
    for _ in range(repetitions):
        for name, command in commands.items():
            shutil.rmtree(output, ignore_errors=True)
            runs[name].append(finished(command))
            print(f"{name}: {runs[name][-1].peak_rss_bytes / 2**20:.0f} MiB", file=sys.stderr, flush=True)
    medians = {
        name: {
            "peak_rss_bytes": statistics.median(run.peak_rss_bytes for run in own),
            "seconds": statistics.median(run.seconds for run in own),
        }
        for name, own in runs.items()
    }
    idle = medians["imports only"]["peak_rss_bytes"]
    for name, figures in medians.items():
        figures["above_imports_bytes"] = figures["peak_rss_bytes"] - idle
        other = medians.get(f"mlx-lm, {name.split(', ')[1]}") if ", " in name else None
        if other is not None:
            figures["rss_ratio"] = figures["peak_rss_bytes"] / other["peak_rss_bytes"]
            above = other["peak_rss_bytes"] - idle
            figures["above_imports_ratio"] = figures["above_imports_bytes"] / above
            figures["seconds_ratio"] = figures["seconds"] / other["seconds"]
    return {"base_bytes": size_of(base), "rank": rank, "repetitions": repetitions, "runs": medians}


def prepare(folder: Path, gigabytes: float, rank: int) -> None:
    """The base in int4, and an adapter for it."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_qlora.config import LoraConfig, ModelConfig, QuantizationConfig
    from mlx_qlora.exchange.fuse_base import find_base
    from mlx_qlora.lora.adapter import AdapterInfo, adapter_tensors, save_adapter, text_sha256
    from mlx_qlora.lora.attach import attach
    from mlx_qlora.quantization.schemes import scheme_named
    from mlx_qlora.weights.source import resolve_model
    from mlx_qlora.weights.stream import quantize_checkpoint

    generate(folder / "source", gigabytes)
    source = resolve_model(str(folder / "source"))
    quantize_checkpoint(source, folder / "int4", scheme_named("int4"))
    shutil.rmtree(folder / "source")
    config, stored = ModelConfig(path=str(folder / "int4")), QuantizationConfig(scheme="none")
    base = find_base(config, stored)
    model, _ = base.model()
    settings = LoraConfig(rank=rank, alpha=2.0 * rank, target_modules=TARGETS)
    attach(model, settings, 0)
    tensors = {
        name: 0.002 * mx.random.normal(array.shape, key=mx.random.key(index))
        if name.endswith("_b")
        else array
        for index, (name, array) in enumerate(tree_flatten(adapter_tensors(model)))
    }
    info = AdapterInfo(
        model=config,
        quantization=stored,
        lora=settings,
        fingerprint=base.fingerprint,
        chat_template="",
        chat_template_sha256=text_sha256(""),
    )
    save_adapter(folder / "adapter", tensors, info, len(model.layers))


def print_table(result: dict) -> None:
    """For a person."""
    table = Table(title=f"Fusing rank {result['rank']} into {result['base_bytes'] / 1e9:.2f} GB of int4")
    columns = (
        "process",
        "peak RSS (MiB)",
        "× mlx-lm",
        "above imports (MiB)",
        "× mlx-lm",
        "seconds",
        "× mlx-lm",
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for name, run in result["runs"].items():
        cells = []
        for key, ratio, unit in (
            ("peak_rss_bytes", "rss_ratio", 2**20),
            ("above_imports_bytes", "above_imports_ratio", 2**20),
            ("seconds", "seconds_ratio", 1),
        ):
            cells += [f"{run[key] / unit:.0f}", f"{run[ratio]:.2f}" if ratio in run else ""]
        table.add_row(name, *cells)
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)
    console.print(f"Peak RSS counts file-backed pages. Median of {result['repetitions']}.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["prepare"]:
        prepare(Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
    else:
        typer.run(main)
