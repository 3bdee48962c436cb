"""A data set looked through: what it holds, what is wrong with it, and what an epoch of it takes."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mlx_qlora.config import DataConfig, TrainingConfig
from mlx_qlora.dataset.check import (
    CHARACTERS_PER_TOKEN,
    CHARACTERS_PER_TOKEN_OTHERWISE,
    CheckedData,
    SplitCheck,
    read_splits,
)
from mlx_qlora.dataset.check_findings import row_findings
from mlx_qlora.dataset.check_language import language_findings
from mlx_qlora.dataset.finding import Finding
from mlx_qlora.dataset.language import Guess
from mlx_qlora.dataset.packing import pack


@dataclass(frozen=True)
class EpochCost:
    """What one pass over the training rows takes."""

    rows: int
    """Without those that are held out for validation."""
    tokens: int
    is_estimate: bool
    """Tokens were not counted but estimated from characters."""
    updates: int
    """Optimizer updates."""
    num_epochs: int
    batch_size: int
    gradient_accumulation: int


@dataclass(frozen=True)
class DataCheck:
    """All that was found."""

    path: str
    splits: dict[str, SplitCheck]
    unit: Literal["tokens", "characters"]
    """Of lengths."""
    max_seq_length: int
    language: Guess | None
    epoch: EpochCost | None
    findings: tuple[Finding, ...]

    @property
    def is_usable(self) -> bool:
        """Whether a run would start on it."""
        return not self.problems

    @property
    def problems(self) -> list[Finding]:
        """What a run would refuse."""
        return [finding for finding in self.findings if finding.severity == "problem"]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        tree = asdict(self)
        if self.language is not None:
            tree["language"]["name"] = self.language.name
        return {"usable": self.is_usable, **tree}


def check_data(
    config: DataConfig,
    training: TrainingConfig,
    tokenizer: Any = None,
    *,
    model: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> DataCheck:
    """Read a data set once and say what is wrong with it, and what each thing can be done about.

    Args:
        training: Gives the updates of an epoch.
        tokenizer: None counts characters and estimates tokens, and says so.
        model: Its model's name, for the commands that are suggested.

    Raises:
        ConfigError: no data is named, or a key of it does not fit.
        DataError: there is no such data.
    """
    checked = read_splits(config, tokenizer, on_progress)
    train = checked.splits["train"]
    language = train.languages.guess()
    per_token = 1.0 if tokenizer is not None else _characters_per_token(language)
    command = f"mlx-qlora train --model {model or 'M'} --data {shlex.quote(str(config.path))}"
    found = [
        *row_findings(checked, per_token, command),
        *language_findings(checked, language, command),
    ]
    order = ("problem", "warning", "note")
    return DataCheck(
        path=str(config.path),
        splits={name: reader.check for name, reader in checked.splits.items()},
        unit="characters" if tokenizer is None else "tokens",
        max_seq_length=config.max_seq_length,
        language=language,
        epoch=_cost(checked, training, per_token) if train.check.rows else None,
        findings=tuple(sorted(found, key=lambda finding: order.index(finding.severity))),
    )


def _characters_per_token(language: Guess | None) -> float:
    code = language.code if language is not None else ""
    return CHARACTERS_PER_TOKEN.get(code, CHARACTERS_PER_TOKEN_OTHERWISE)


def _cost(checked: CheckedData, training: TrainingConfig, per_token: float) -> EpochCost:
    config, reader = checked.config, checked.splits["train"]
    num_rows = reader.check.rows - reader.check.dropped
    held = 0.0
    if "valid" not in checked.splits and config.valid_fraction > 0 and num_rows > 1:
        held = max(1, round(num_rows * config.valid_fraction)) / num_rows
    trained = max(1, round(num_rows * (1 - held)))
    lengths = [min(config.max_seq_length, int(n / per_token)) for n in reader.table.lengths]
    tokens = reader.check.tokens if checked.tokenizer is not None else sum(lengths)
    in_batches = trained
    if config.packing:
        in_batches = max(1, round(len(pack(lengths, config.max_seq_length)) * (1 - held)))
    micro_batches = -(-in_batches // training.batch_size)
    return EpochCost(
        rows=trained,
        tokens=round((tokens or 0) * (1 - held)),
        is_estimate=checked.tokenizer is None,
        updates=-(-micro_batches // training.gradient_accumulation),
        num_epochs=training.num_epochs,
        batch_size=training.batch_size,
        gradient_accumulation=training.gradient_accumulation,
    )
