"""A model trains in the memory of a small Mac: the presets, under a hard limit.

    python benchmarks/seven_billion.py --preset mac-8gb
    python benchmarks/seven_billion.py --preset mac-8gb --shape data/shapes/SmolLM2-360M

A random model in int4 of Mistral-7B's shape (3.8 GiB of files, made once), or of any config.json, takes two
steps of the preset through `mlx-qlora train`, in a Linux control group (root needed) with two thirds of the
Mac's memory: 5.3 GiB for 8 GB, 10.6 GiB for 16 GB, 21.3 GiB for 32 GB. Every row fills the window. Printed:
the peak of the process, what `mlx-qlora plan` predicted, seconds. A CPU computes in float32, scales included:
0.4 GiB more for 7B than the bfloat16 of a Mac. With a system BLAS and two cores a step of mac-8gb takes
minutes for 7B; without one, hours.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from control_group import KILLED, run_limited
from rich.console import Console
from rich.table import Table

GIB = 1024**3
LIMITS_GIB = {"mac-8gb": 5.3, "mac-16gb": 10.6, "mac-32gb": 21.3}
USUAL = ("mac-8gb", "mac-16gb")
"""The presets that are measured when none is named."""
DATA = Path(__file__).parents[1] / "data"
DEMO_MODEL, SHAPE = DATA / "demo" / "model", DATA / "shapes" / "Mistral-7B"
GROUP_SIZE, BITS = 64, 4


def main(
    preset: Annotated[
        list[str] | None, typer.Option(help="mac-8gb, mac-16gb, mac-32gb; the first two when not given.")
    ] = None,
    shape: Annotated[Path, typer.Option(help="Folder with the config.json of a 16-bit model.")] = SHAPE,
    steps: Annotated[int, typer.Option(min=1)] = 2,
    accumulation: Annotated[
        int | None, typer.Option(help="Micro-batches per step; the preset's own when not given.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Where the model is made, or found again.")] = None,
    record: Annotated[
        Path | None, typer.Option(help="Add the figures to this JSON file: docs/presets.json.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Measure the presets and print a table."""
    name = "mlx_qlora-7b" if shape == SHAPE else f"mlx_qlora-{shape.name}"
    model = model or Path(tempfile.gettempdir(), name)
    if not (model / "config.json").exists():
        write_model(model, shape)
    results = {name: measure(name, model, steps, accumulation) for name in preset or USUAL}
    if record is not None:
        found = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
        found[shape.name] = {**found.get(shape.name, {}), **results}
        record.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(results))
        return
    table = Table(title=f"{shape.name}'s shape, int4, {steps} steps", title_justify="left")
    for column in ("preset", "limit GiB", "peak GiB", "predicted GiB", "seconds", "tokens/s"):
        table.add_column(column, justify="right")
    for name, result in results.items():
        sizes = [f"{result[key] / GIB:.2f}" for key in ("limit_bytes", "peak_bytes", "predicted_bytes")]
        table.add_row(name, *sizes, f"{result['seconds']:.0f}", f"{result['tokens_per_second']:.2f}")
    Console().print(table)


def measure(preset: str, model: Path, steps: int, accumulation: int | None) -> dict[str, Any]:
    """Plan and train one preset under its limit.

    Raises:
        SystemExit: the run did not come to its end.
    """
    limit_bytes = round(LIMITS_GIB[preset] * GIB)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "train.jsonl"
        row = json.dumps({"prompt": "Conte até mil.", "completion": " ".join(map(str, range(1000)))})
        data.write_text(f"{row}\n" * 64, encoding="utf-8")
        run = ["--model", str(model), "--data", str(data), "--preset", preset]
        run += ["--set", f"training.max_steps={steps}", "--set", "data.valid_fraction=0"]
        run += ["--set", f"training.memory_budget_gib={LIMITS_GIB[preset]}"]
        run += ["--set", f"training.gradient_accumulation={accumulation}"] if accumulation else []
        plan = _object(run_limited([*_command("plan"), *run, "--json"], limit_bytes))
        say(f"{preset}: predicted {plan['peak_bytes'] / GIB:.2f} GiB; training …")
        trained = run_limited(
            [*_command("train"), *run, "--adapter-path", f"{folder}/adapter", "--force", "--json"],
            limit_bytes,
        )
    result = _object(trained)
    return {
        "steps": steps,
        "limit_bytes": limit_bytes,
        "peak_bytes": result["peak_memory_bytes"],
        "predicted_bytes": plan["peak_bytes"],
        "predicted_parts": plan["parts"],
        "seconds": result["seconds"],
        "tokens_per_second": result["tokens_per_second"],
        "train_loss_nats": result["train_loss_nats"],
    }


def write_model(folder: Path, shape: Path) -> None:
    """Write a random model of a shape a layer at a time, with the tokenizer of the embedded one."""
    import mlx.core as mx

    say(f"Making the model in {folder} …")
    folder.mkdir(parents=True, exist_ok=True)
    mx.random.seed(0)
    shards: dict[str, str] = {}
    for number, tensors in enumerate(_shards(shape)):
        name = f"model-{number + 1:05d}.safetensors"
        mx.save_safetensors(str(folder / name), tensors, {"format": "mlx"})
        shards |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}), encoding="utf-8")
    for file in DEMO_MODEL.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    quantization = {"group_size": GROUP_SIZE, "bits": BITS, "mode": "affine"}
    config = json.loads((shape / "config.json").read_text(encoding="utf-8"))
    config |= {"quantization": quantization, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")  # last: the model is whole


def _shards(shape: Path) -> Iterator[dict[str, Any]]:
    """The tensors, those of one layer at a time; a model without values gives their names and shapes."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_qlora.weights.plan import skeleton
    from mlx_qlora.weights.source import resolve_model

    model = skeleton(resolve_model(str(shape), needs_weights=False))
    is_stored_small = {path for path, module in model.named_modules() if hasattr(module, "to_quantized")}
    parts: dict[str, dict[str, Any]] = {}
    for path, array in tree_flatten(model.parameters()):
        module, _, kind = path.rpartition(".")
        number = next((word for word in path.split(".") if word.isdigit()), module)
        tensors = parts.setdefault(number, {})
        if module in is_stored_small and kind == "weight":
            tensors[module] = array.shape  # a name without "weight": to be quantized
        else:
            tensors[path] = (mx.zeros if kind == "bias" else mx.ones)(array.shape, mx.bfloat16)
    for tensors in parts.values():
        made = [_quantized(name, *each) for name, each in tensors.items() if isinstance(each, tuple)]
        kept = {name: each for name, each in tensors.items() if not isinstance(each, tuple)}
        yield {name: array for part in [kept, *made] for name, array in part.items()}


def _quantized(name: str, rows: int, columns: int) -> dict[str, Any]:
    """Random codes, and scales that give the weights a standard deviation of 1 / √columns."""
    import mlx.core as mx

    packed = mx.random.randint(0, 2**16, (rows, columns * BITS // 16)).astype(mx.uint16).view(mx.uint32)
    scale = (12 / (columns * (4**BITS - 1))) ** 0.5
    scales = mx.full((rows, columns // GROUP_SIZE), scale, mx.bfloat16)
    biases = -scales * (2**BITS - 1) / 2
    return {f"{name}.weight": packed, f"{name}.scales": scales, f"{name}.biases": biases}


def _command(name: str) -> list[str]:
    return [sys.executable, "-m", "mlx_qlora", name]


def _object(done: Any) -> dict[str, Any]:
    if done.returncode:
        reason = "killed at the memory limit" if done.returncode == KILLED else f"exit code {done.returncode}"
        raise SystemExit(f"{reason}: {' '.join(done.args)}\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
