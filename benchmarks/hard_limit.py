"""One training run under a hard memory limit: mlx-lm's is killed, ours completes, to the same loss.

    python benchmarks/hard_limit.py

A random Llama in int4 (hidden size 256, 2 layers, vocabulary 64 000) trains 4 steps of 8 rows of 512 tokens
by command line, `mlx_lm lora` and `mlx-qlora train`, each as a process in a Linux control group of 1 GiB
(root needed). Then ours once more, with a budget (training.memory_budget_gib) that these micro-batches pass:
it clears MLX's cache, halves the micro-batch, and ends with the loss of the run that had room.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from control_group import KILLED, run_limited
from pairing import environment
from random_llama import DEMO_MODEL, write_random_llama
from rich.console import Console
from rich.table import Table

GIB = 1024**3
STEPS, BATCH, LENGTH, RANK, LAYERS = 4, 8, 512, 8, 2
TARGETS = ("q_proj", "k_proj", "v_proj")


def main(
    limit_gib: Annotated[float, typer.Option(help="What a process may take.")] = 1.0,
    budget_gib: Annotated[float, typer.Option(help="What the last run is told to stay below.")] = 0.3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Run the three and print a table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _prepare(folder)
        results = {
            "mlx-lm": _mlx_lm(folder, limit_gib),
            "ours": _ours(folder, limit_gib, None),
            "ours, told to stay below": _ours(folder, limit_gib, budget_gib),
        }
    if as_json:
        print(json.dumps({"limit_gib": limit_gib, "budget_gib": budget_gib, "runs": results}))
        return
    table = Table(title=f"Four steps in a control group of {limit_gib:g} GiB", title_justify="left")
    for column in ("", "ended", "peak MiB", "loss, nats", "what it did for memory"):
        table.add_column(column)
    for side, result in results.items():
        peak = f"{result['peak_memory_bytes'] / 2**20:.0f}" if "peak_memory_bytes" in result else ""
        loss = f"{result['train_loss_nats']:.5f}" if "train_loss_nats" in result else ""
        table.add_row(side, result["ended"], peak, loss, "\n".join(result.get("actions", [])))
    Console().print(table)


def _mlx_lm(folder: Path, limit_gib: float) -> dict[str, Any]:
    settings = {
        "lora_parameters": {
            "rank": RANK,
            "scale": 2.0,
            "dropout": 0.0,
            "keys": [f"self_attn.{key}" for key in TARGETS],
        }
    }
    (folder / "lora.yaml").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "mlx_lm", "lora", "--train", "-c", str(folder / "lora.yaml")]
    command += ["--model", str(folder / "model"), "--data", str(folder / "data"), "--iters", str(STEPS)]
    command += ["--batch-size", str(BATCH), "--max-seq-length", str(LENGTH), "--num-layers", str(LAYERS)]
    command += ["--adapter-path", str(folder / "theirs"), "--val-batches", "0", "--steps-per-report", "1"]
    done = run_limited(command, round(limit_gib * GIB), environment(has_blas=True))
    if done.returncode not in (0, KILLED):
        raise SystemExit(done.stderr[-2000:])
    return {"ended": "killed by the kernel" if done.returncode == KILLED else "completed"}


def _ours(folder: Path, limit_gib: float, budget_gib: float | None) -> dict[str, Any]:
    adapter = folder / f"ours-{budget_gib}"
    settings = {
        "model": {"path": str(folder / "model")},
        "data": {"path": str(folder / "data"), "max_seq_length": LENGTH, "loss_on": "all"},
        "lora": {"rank": RANK, "target_modules": list(TARGETS)},
        "training": {
            "max_steps": STEPS,
            "batch_size": BATCH,
            "gradient_accumulation": 1,
            "memory_budget_gib": budget_gib,
            "steps_per_validation": 1000,
        },
    }
    (folder / "run.yaml").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "mlx_qlora", "train", "--config", str(folder / "run.yaml"), "--json"]
    command += ["--force"] if budget_gib else []
    done = run_limited(
        [*command, "--adapter-path", str(adapter)], round(limit_gib * GIB), environment(has_blas=True)
    )
    if done.returncode == KILLED:
        return {"ended": "killed by the kernel"}
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    events = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    result = json.loads(done.stdout)
    kept = {key: result[key] for key in ("peak_memory_bytes", "train_loss_nats", "seconds")}
    return {"ended": "completed", **kept, "actions": [e["action"] for e in events if "action" in e]}


def _prepare(folder: Path) -> None:
    write_random_llama(folder / "model", vocabulary=64_000, hidden=256, layers=LAYERS)
    for file in DEMO_MODEL.glob("*token*"):
        shutil.copyfile(file, folder / "model" / file.name)
    (folder / "data").mkdir()
    for name, first in (("train", 0), ("valid", 10_000)):
        rows = [
            json.dumps({"text": " ".join(map(str, range(first + i, first + i + 600)))}) for i in range(64)
        ]
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
