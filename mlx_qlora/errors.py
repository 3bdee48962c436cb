"""What can go wrong, said so that a person can act: what, where, and the next command."""

from __future__ import annotations

from collections.abc import Sequence


class MlxQloraError(Exception):
    """A failure the user can mend. Commands print it without a traceback.

    Args:
        what: One sentence: what is wrong.
        where: The file, line, key or layer it was found at.
        run: The next command to type.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, run: str | None = None) -> None:
        self.what, self.where, self.run = what, where, run
        lines = [what]
        if where:
            lines.append(f"  at: {where}")
        if run:
            lines.append(f"Run: {run}")
        super().__init__("\n".join(lines))

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows of it: what a command prints, without a traceback. IPython asks for this."""
        return [f"{type(self).__name__}: {self}"]


class ConfigError(MlxQloraError):
    """A configuration key or value that does not exist or does not fit."""


class ModelError(MlxQloraError):
    """A model that cannot be found, is not supported, or would run foreign code."""


class WeightsError(MlxQloraError):
    """A weight file that is truncated, corrupt or does not belong to its model."""


class StorageError(MlxQloraError):
    """A disk that is full, read-only or gone."""


class DataError(MlxQloraError):
    """Training rows that cannot be used."""


class AdapterError(MlxQloraError):
    """An adapter that is broken or belongs to another base model."""


class CheckpointError(MlxQloraError):
    """A checkpoint that is broken or belongs to another run."""


class MemoryBudgetError(MlxQloraError):
    """A run that does not fit the memory it was given."""


class DivergenceError(MlxQloraError):
    """A training run whose numbers stayed non-finite after every remedy."""


class Interrupted(MlxQloraError):
    """The run was asked to stop and has saved itself.

    Args:
        signal_number: The signal that asked; the exit code is 128 + this.
    """

    def __init__(self, what: str, *, signal_number: int, run: str | None = None) -> None:
        super().__init__(what, run=run)
        self.exit_code = 128 + signal_number


def listed(problems: Sequence[str], *, limit: int = 20) -> str:
    """The first `limit` problems, one a line, and how many more there are."""
    lines = [f"  {problem}" for problem in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  … and {len(problems) - limit} more")
    return "\n".join(lines)
