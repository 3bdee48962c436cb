"""What a training run left to be told on a model card: figures, never a row of its data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_qlora.config import RunConfig, to_yaml
from mlx_qlora.presets import GIB

Entry = Mapping[str, Any]
_DATA_LINE = re.compile(r"(train|valid|test): \d+ rows?(,| cut| longer| unusable| duplicates)[^/\\]*")
_ENVIRONMENT = ("device", "device memory limit", "mlx-qlora", "mlx", "mlx-lm")


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """A run in figures."""

    rows: list[tuple[str, str]]
    """Name and value: updates, tokens, time, memory."""
    validations: list[tuple[int, float | None, float]]
    """Step, mean training loss since the one before, validation loss; in nats per target token."""
    best_step: int | None
    data: list[str]
    """Statistics of the rows, a sentence each."""


def run_facts(entries: Sequence[Entry], report: str = "") -> RunFacts:
    """The figures of a run.

    Args:
        entries: Its metrics, what was undone left out (``training.metrics.read_metrics``).
        report: Its report.md, for the device it ran on.
    """
    steps = [e for e in entries if e["event"] == "StepDone"]
    validated = [e for e in entries if e["event"] == "Validated"]
    started = [e for e in entries if e["event"] == "RunStarted"]
    best = [v["step"] for v in validated if v["is_best"]]
    notes = [note for e in started[-1:] for note in e.get("notes", ())]
    return RunFacts(
        rows=[*_cost(entries, steps, started), *_environment(report)],
        validations=_validations(steps, validated),
        best_step=best[-1] if best else None,
        data=[note for note in notes if _DATA_LINE.fullmatch(note)],
    )


def shared_config(config: RunConfig, base_model: str) -> str:
    """A run's configuration as YAML, with the base's hub id and of the data's path only its last name."""
    data = config.data.path
    update = {
        "model": config.model.model_copy(update={"path": base_model}),
        "data": config.data.model_copy(update={"path": Path(data).name if data else None}),
    }
    return to_yaml(config.model_copy(update=update))


def _cost(
    entries: Sequence[Entry], steps: Sequence[Entry], started: Sequence[Entry]
) -> list[tuple[str, str]]:
    if not steps:
        return []
    finished = [e for e in entries if e["event"] == "RunFinished"]
    seconds, tokens = sum(s["seconds"] for s in steps), sum(s["tokens"] for s in steps)
    peaks = [s["memory"]["footprint_bytes"] for s in steps] + [f["peak_memory_bytes"] for f in finished]
    mlx_peak = max(s["memory"]["mlx_peak_bytes"] for s in steps)
    rows = [("updates", f"{len(steps)}")]
    if started:
        rows.append(("trained parameters", f"{started[-1]['trainable_parameters']:,}"))
        rows.append(("parameters of the base", f"{started[-1]['total_parameters']:,}"))
    return [
        *rows,
        ("tokens read", f"{tokens:,} ({sum(s['target_tokens'] for s in steps):,} of them targets)"),
        ("time in updates", _duration(seconds)),
        ("tokens per second", f"{tokens / seconds:.0f}" if seconds else "–"),
        ("peak memory of the process", f"{max(peaks) / GIB:.2f} GiB"),
        ("MLX peak, without its cache", f"{mlx_peak / GIB:.2f} GiB"),
    ]


def _environment(report: str) -> list[tuple[str, str]]:
    """The device and versions that a run wrote into its report."""
    section = report.rpartition("## Environment")[2]  # an answer quoted above may hold these words too
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    found = {pair[0]: pair[1] for pair in cells if len(pair) == 2}
    return [(name, found[name]) for name in _ENVIRONMENT if name in found]


def _validations(steps: Sequence[Entry], validated: Sequence[Entry]) -> list[tuple[int, float | None, float]]:
    rows, begin = [], 0
    for entry in validated:
        since = [s for s in steps if begin < s["step"] <= entry["step"] and not s["skipped"]]
        tokens = sum(s["target_tokens"] for s in since)
        train = sum(s["loss_nats"] * s["target_tokens"] for s in since) / tokens if tokens else None
        loss = entry["loss_nats"]
        rows.append((entry["step"], train, math.nan if loss is None else loss))
        begin = entry["step"]
    return rows


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
