"""All experiments, by name."""

from __future__ import annotations

from collections.abc import Callable

from tests.faults import hostile, kills, numbers, power, ranks, rows, soak, storage
from tests.faults.harness import PROJECT, Bench, Row, Scale


def _mutations(bench: Bench, scale: Scale) -> list[Row]:
    return rows.mutations(bench, scale, list(rows.real_files(PROJECT)))


ALL: dict[str, Callable[[Bench, Scale], list[Row]]] = {
    "kill": kills.training,
    "commands": kills.commands,
    "writes": storage.failing_writes,
    "power": power.losses,
    "full": storage.full_disk,
    "folders": storage.unusual_folders,
    "damage": storage.damage,
    "numbers": numbers.injected,
    "data": _mutations,
    "lines": rows.line_numbers,
    "control": rows.control_tokens,
    "config": rows.configurations,
    "hostile": hostile.files,
    "ranks": ranks.faults,
    "soak": soak.flat,
}
