"""What a suggestion is, and what rules are told of a run."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_qlora.config import RunConfig
from mlx_qlora.training.metrics import Entry, events_named
from mlx_qlora.training.window import Window


@dataclass(frozen=True, kw_only=True)
class Room:
    """A setting that takes more memory, for time, and still fits by the plan."""

    assignments: tuple[str, ...]
    needed_bytes: int
    """Its predicted peak."""
    budget_bytes: int
    effect: str


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What rules know of a run besides its metrics."""

    config: RunConfig
    num_rows: int = 0
    """Of the training split, those that were dropped included."""
    cut_rows: int = 0
    dropped_rows: int = 0
    unlabelled_rows: int = 0
    """Rows of which no token is a target: left out because nothing of them can be learnt."""
    window: Window | None = None
    room: Room | None = None


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """One thing to change, and why."""

    topic: str
    """A word that names the rule, such as ``overfitting``."""
    reason: str
    """What was measured."""
    assignments: tuple[str, ...] = ()
    """As ``--set`` takes them, for a run that begins anew."""
    advice: str = ""
    """What to do where no key does it."""

    @property
    def options(self) -> str:
        """As typed."""
        return " ".join(f"--set {shlex.quote(assignment)}" for assignment in self.assignments)

    @property
    def keys(self) -> set[str]:
        """The configuration's keys that it sets."""
        return {assignment.partition("=")[0] for assignment in self.assignments}

    @property
    def line(self) -> str:
        """The suggestion in one line."""
        return f"{self.reason}: {self.options or self.advice}"


Rule = Callable[[Sequence[Entry], RunFacts], Suggestion | None]
"""A pure function of the run's metrics (`read_metrics`) and of its facts; None where it does not apply."""


def updates(entries: Sequence[Entry]) -> list[Entry]:
    """The updates that stand."""
    return events_named(entries, "StepDone")


def times(count: int) -> str:
    """So often, in words."""
    return "once" if count == 1 else f"{count} times"


def counted(count: int, noun: str) -> str:
    """So many, with the verb that follows."""
    return f"{count} {noun} was" if count == 1 else f"{count} {noun}s were"
