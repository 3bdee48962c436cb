"""A long run: nothing grows."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import psutil

from mlx_qlora.config import build_config
from mlx_qlora.training.events import StepDone
from mlx_qlora.training.run import train
from tests.faults.harness import SETTINGS, Bench, Row, Scale

MIB = 1024**2
WARM_UP = 0.2
"""Share of the steps that are not looked at: caches fill, shapes are met for the first time."""


def flat(bench: Bench, scale: Scale) -> list[Row]:
    """Train with validation and checkpoints every 50 steps; watch footprint, open files, cache and time."""
    steps = scale.steps
    tree = {"model": {"path": str(bench.model)}, "data": {"path": str(bench.data)}}
    for key, value in SETTINGS.items():
        room, name = key.split(".")
        tree.setdefault(room, {})[name] = value
    tree["training"] |= {"max_steps": steps, "steps_per_validation": 50, "steps_per_checkpoint": 50}
    seen: list[tuple[float, float, int, float]] = []
    process = psutil.Process()

    def watch(event: object) -> None:
        if isinstance(event, StepDone):
            memory = event.memory
            files = process.num_fds() if os.name == "posix" else 0
            seen.append((memory.footprint_bytes, memory.mlx_cache_bytes, files, event.seconds))

    adapter = bench.folder / "soak"
    train(build_config(tree), adapter, observers=[watch])
    table = np.array(seen, float)[int(WARM_UP * steps) :]
    fault = f"{steps} steps, validated and saved every 50"
    row = Row("long run", fault, "memory, files and time flat, no step missing in metrics.jsonl")
    row.note(_growth("footprint", table[:, 0] / MIB, "MiB", limit=1.0))
    row.note(_growth("cache", table[:, 1] / MIB, "MiB", limit=1.0))
    row.note(_growth("open files", table[:, 2], "files", limit=0.5))
    thirds = np.array_split(table[:, 3], 3)
    first, last = np.median(thirds[0]), np.median(thirds[2])
    row.note(None if last < 1.5 * first else f"a step takes {last:.4f} s at the end, {first:.4f} s before")
    row.note(_missing(adapter / "metrics.jsonl", steps))
    print(
        f"    footprint {_slope(table[:, 0] / MIB):+.3f} MiB, cache {_slope(table[:, 1] / MIB):+.3f} MiB, "
        f"files {_slope(table[:, 2]):+.2f} per 100 steps; a step {first:.4f} s, then {last:.4f} s",
        file=sys.stderr,
    )
    return [row]


def _slope(values: np.ndarray) -> float:
    """Per 100 steps, by least squares."""
    return 100 * float(np.polyfit(np.arange(len(values)), values, 1)[0])


def _growth(what: str, values: np.ndarray, unit: str, *, limit: float) -> str | None:
    slope = _slope(values)
    return None if slope < limit else f"{what} grows by {slope:.2f} {unit} per 100 steps"


def _missing(path: Path, steps: int) -> str | None:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    there = [line["step"] for line in lines if line["event"] == "StepDone"]
    return None if there == list(range(1, steps + 1)) else f"metrics.jsonl has {len(there)} of {steps} steps"
