"""What a finished run suggests for the next one: each with what was measured, and the keys to set.

What the trainer can do about a run by itself it has done already (`guard`, `Trainer`); these are decisions
about the data, the schedule and the settings, which are a person's.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from mlx_qlora.training.cost_rules import (
    cut_rows,
    empty_window,
    falling_speed,
    relieved,
    room_left,
    unlabelled_rows,
)
from mlx_qlora.training.learning_rules import no_validation, overfitting, still_learning, too_high_rate
from mlx_qlora.training.metrics import Entry
from mlx_qlora.training.suggestion import Rule, RunFacts, Suggestion

RULES: Sequence[Rule] = (
    too_high_rate,
    overfitting,
    still_learning,
    no_validation,
    unlabelled_rows,
    cut_rows,
    falling_speed,
    relieved,
    empty_window,
    room_left,
)
"""The gravest first."""


def suggestions(entries: Sequence[Entry], facts: RunFacts) -> tuple[Suggestion, ...]:
    """What the rules say of a run, the gravest first; of two that set the same key, the graver.

    Args:
        entries: Of its metrics.jsonl, by `read_metrics`.
    """
    found: list[Suggestion] = []
    keys: set[str] = set()
    for rule in RULES:
        said = rule(entries, facts)
        if said is not None and keys.isdisjoint(said.keys):
            found.append(said)
            keys |= said.keys
    return tuple(found)


def command(folder: Path, found: Sequence[Suggestion]) -> str:
    """The command that runs it again, in another folder, with all that is suggested."""
    options = " ".join(s.options for s in found if s.assignments)
    again = shlex.quote(str(folder.with_name(f"{folder.name}-2")))
    return (
        f"mlx-qlora train --config {shlex.quote(str(folder / 'run.yaml'))} --adapter-path {again} {options}"
    )
