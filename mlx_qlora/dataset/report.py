"""What was found in a data set, for a person to read before it is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mlx_qlora.dataset.records import Example


@dataclass
class SplitReport:
    """What was found in one split."""

    rows: int = 0
    bad: list[str] = field(default_factory=list)
    """``file:line: why`` of each row that cannot be used."""
    truncated: int = 0
    dropped: int = 0
    duplicates: int = 0
    """Rows whose tokens another row before them has."""
    tokens: int = 0
    target_tokens: int = 0
    lengths: tuple[int, int, int, int] = (0, 0, 0, 0)
    """50th, 90th and 99th percentile and maximum, in tokens, after truncation."""

    def count(self, examples: Sequence[Example]) -> None:
        """Take in the rows that are left."""
        self.rows = len(examples)
        if not examples:
            return
        lengths = [len(example.tokens) for example in examples]
        self.tokens = sum(lengths)
        self.target_tokens = sum(int(example.targets_mask.sum()) for example in examples)
        self.duplicates = len(examples) - len({example.tokens.tobytes() for example in examples})
        p50, p90, p99 = (int(np.percentile(lengths, share)) for share in (50, 90, 99))
        self.lengths = (p50, p90, p99, max(lengths))

    def lines(self, name: str) -> list[str]:
        """The split for a person, one fact a line."""
        p50, p90, p99, longest = self.lengths
        lines = []
        if self.rows:
            lines.append(
                f"{name}: {_rows(self.rows)}, {self.tokens} tokens ({self.target_tokens} targets); "
                f"length {p50} median, {p90} at 90 %, {p99} at 99 %, {longest} at most"
            )
        counts = (
            (len(self.bad), "unusable and left out"),
            (self.truncated, "cut to max_seq_length"),
            (self.dropped, "longer than max_seq_length and dropped"),
            (self.duplicates, "duplicates of another row"),
        )
        lines += [f"{name}: {_rows(count)} {what}" for count, what in counts if count]
        return lines + [f"  {problem}" for problem in self.bad[:3]]


@dataclass
class DataReport:
    """What was found in a data set."""

    splits: dict[str, SplitReport]
    leaked: list[str]
    """Rows of valid and test whose tokens or prompt stand in train too."""
    notes: list[str]

    def lines(self) -> list[str]:
        """The report for a person, one fact a line."""
        lines = [*self.notes]
        for name, split in self.splits.items():
            lines += split.lines(name)
        if self.leaked:
            shown = ", ".join(self.leaked[:5]) + (", …" if len(self.leaked) > 5 else "")
            count = _rows(len(self.leaked))
            lines.append(f"warning: {count} of valid or test, or their prompts, stand in train: {shown}")
        return lines


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"
