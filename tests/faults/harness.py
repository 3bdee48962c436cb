"""What all fault experiments share: a table of what was tried and what survived, processes, tiny material."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

CLI = (sys.executable, "-m", "mlx_qlora")
INJECTED = Path(__file__).parent / "injected"
PROJECT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 300


@dataclass
class Row:
    """One kind of fault: how often it was tried, and every time that something was lost."""

    room: str
    fault: str
    expected: str
    """What counts as survived."""
    tried: int = 0
    lost: list[str] = field(default_factory=list)
    """What was lost, each with enough to do it again."""

    @property
    def survived(self) -> int:
        """Times that all went as expected."""
        return self.tried - len(self.lost)

    def note(self, problem: str | None) -> None:
        """Count one trial; `problem` says what was lost, None that nothing was."""
        self.tried += 1
        if problem is not None:
            self.lost.append(problem)


@dataclass(frozen=True)
class Scale:
    """How often each fault is tried."""

    kills: int
    signals: int
    stages: int
    """File operations at which a process is killed, or the disk fails, spread over all there are."""
    mutations: int
    steps: int
    """Of the long run."""


QUICK = Scale(kills=2, signals=1, stages=3, mutations=300, steps=100)
FULL = Scale(kills=200, signals=20, stages=200, mutations=20_000, steps=2_000)

SETTINGS = {
    "lora.rank": 4,
    "lora.dropout": 0.2,
    "data.max_seq_length": 64,
    "training.max_steps": 12,
    "training.batch_size": 2,
    "training.gradient_accumulation": 2,
    "training.learning_rate": 0.01,
    "training.warmup_steps": 2,
    "training.steps_per_validation": 5,
    "training.steps_per_checkpoint": 3,
    "training.keep_checkpoints": 2,
}


@dataclass(frozen=True)
class Bench:
    """A tiny model, tiny data and a folder to do harm in."""

    model: Path
    data: Path
    folder: Path

    def train_command(self, adapter: Path, *extra: str) -> list[str]:
        """Begins where nothing is, goes on where something is."""
        sets = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
        paths = ["--model", str(self.model), "--data", str(self.data), "--adapter-path", str(adapter)]
        return [*CLI, "train", *paths, *sets, "--resume", *extra]

    def environment(self, **more: str) -> dict[str, str]:
        """Of the processes that are harmed."""
        return {
            **os.environ,
            "PYTHONPATH": str(PROJECT),
            "MLX_QLORA_CACHE": str(self.folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            **more,
        }

    def injected(self, under: Path, at: int, kind: str, count: Path | None = None) -> dict[str, str]:
        """An environment in which file operation number `at` under a folder is the fault."""
        more = {"FAULT_COUNT": str(count)} if count is not None else {}
        return self.environment(FAULT_UNDER=str(under), FAULT_AT=str(at), FAULT_KIND=kind, **more) | {
            "PYTHONPATH": os.pathsep.join([str(INJECTED), str(PROJECT)])
        }


def make_data(folder: Path, *, rows: int = 30) -> Path:
    """Questions and answers of different lengths, the same each time."""
    rng = random.Random(4)
    words = ["o", "clube", "venceu", "a", "partida", "no", "estádio", "com", "dois", "gols", "em", "casa"]
    folder.mkdir(parents=True)
    for name, count in (("train", rows), ("valid", 6)):
        lines = [
            {
                "prompt": " ".join(rng.choices(words, k=rng.randint(2, 9))) + f" {name}{number}?",
                "completion": " ".join(rng.choices(words, k=rng.randint(1, 4))),
            }
            for number in range(count)
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def finish(command: Sequence[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run to the end."""
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS
    )


def said_badly(done: subprocess.CompletedProcess[str], code: int = 2) -> str | None:
    """What is wrong with how a command failed: it must end with `code`, one clear error, no traceback."""
    if "Traceback (most recent call last)" in done.stderr:
        return f"a traceback: {done.stderr.strip().splitlines()[-1]}\n{done.stderr[-1500:]}"
    if done.returncode != code:
        return f"exit code {done.returncode}, not {code}: {done.stderr[-300:]}"
    return None if "error:" in done.stderr else f"no error was said: {done.stderr[-300:]}"


def spread(count: int, total: int) -> list[int]:
    """At most `count` of the numbers 1 … total, evenly, the ends included."""
    if count >= total:
        return list(range(1, total + 1))
    return sorted({1 + round(index * (total - 1) / max(count - 1, 1)) for index in range(count)})


def published(adapter: Path) -> dict[str, bytes]:
    """What people ship."""
    return {name: (adapter / name).read_bytes() for name in ("adapters.safetensors", "adapter_config.json")}
