"""One thing that was found out about this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of what is so, and what to do about it."""

    subject: str
    """What was looked at, in a word or two; unique among a machine's findings."""
    status: Status
    """problem: work is prevented. warning: it is slower, less safe or less certain than it could be."""
    text: str
    run: str | None = None
    """The exact command to type; every problem and warning has one. Of an ok one: what may be of use."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The same as numbers and names, for programs."""


Check = Callable[[], Iterable[Finding]]


def gathered(checks: Iterable[tuple[str, Check]]) -> list[Finding]:
    """The findings of all checks, in order. One that fails says so in its place and stops no other.

    Args:
        checks: What each looks at, and the function that does.
    """
    findings: list[Finding] = []
    for subject, check in checks:
        try:
            findings += check()
        except Exception as error:
            findings.append(_not_found_out(subject, error))
    return findings


def has_problem(findings: Iterable[Finding]) -> bool:
    """Whether something prevents work."""
    return any(finding.status == "problem" for finding in findings)


def _not_found_out(subject: str, error: Exception) -> Finding:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, ImportError):
        return Finding(
            subject,
            "problem",
            f"a library cannot be imported ({reason})",
            "python -m pip install --force-reinstall mlx-qlora",
        )
    return Finding(
        subject, "warning", f"could not be found out ({reason})", "mlx-qlora doctor --json   # to report it"
    )
