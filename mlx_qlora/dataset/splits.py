"""A data set for a run: which file is which split, what is wrong with it, and what is in it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qlora.config import DataConfig
from mlx_qlora.dataset.records import COLUMN_NAMES, BadRow, Example, Record, read_records
from mlx_qlora.dataset.render import ensure_chat_template, render, truncated
from mlx_qlora.errors import ConfigError, DataError, listed

_FILES = {
    "train": ("train",),
    "valid": ("valid", "validation", "val", "dev"),
    "test": ("test",),
}
_SUFFIXES = (".jsonl", ".csv", ".json")


@dataclass
class SplitReport:
    """What was found in one split."""

    rows: int = 0
    bad: list[str] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0
    duplicates: int = 0
    tokens: int = 0
    target_tokens: int = 0
    lengths: tuple[int, int, int, int] = (0, 0, 0, 0)
    """50th, 90th and 99th percentile and maximum, in tokens, after truncation."""


@dataclass
class DataReport:
    """What was found in a data set."""

    splits: dict[str, SplitReport]
    leaked: list[str]
    """Rows of valid and test that stand in train too."""
    notes: list[str]

    def lines(self) -> list[str]:
        """The report for a person, one fact a line."""
        lines = [*self.notes]
        for name, split in self.splits.items():
            if not split.rows:
                continue
            p50, p90, _, longest = split.lengths
            lines.append(
                f"{name}: {split.rows} rows, {split.tokens} tokens ({split.target_tokens} targets), "
                f"length {p50} median, {p90} at 90 %, {longest} at most"
            )
            counts = (
                (len(split.bad), "unusable and left out"),
                (split.truncated, "cut to max_seq_length"),
                (split.dropped, "longer than max_seq_length and dropped"),
                (split.duplicates, "duplicates of another row"),
            )
            lines += [f"{name}: {count} rows {what}" for count, what in counts if count]
        if self.leaked:
            shown = ", ".join(self.leaked[:5])
            lines.append(f"warning: {len(self.leaked)} rows of valid or test stand in train: {shown}")
        return lines


@dataclass(frozen=True)
class Dataset:
    """A data set as tokens."""

    train: list[Example]
    valid: list[Example]
    test: list[Example]
    report: DataReport


def load_dataset(config: DataConfig, tokenizer: Any, seed: int) -> Dataset:
    """Read, check, render and split the data of a run.

    Args:
        seed: Decides the split when the data has no validation file.

    Raises:
        DataError: rows cannot be used (all are reported) or there is nothing to train on.
        ConfigError: a column is renamed that does not exist.
    """
    unknown = sorted(set(config.columns) - set(COLUMN_NAMES))
    if unknown:
        raise ConfigError(
            f"data.columns renames {', '.join(unknown)}; there are {', '.join(COLUMN_NAMES)}.",
            where="data.columns",
        )
    notes = []
    if not ensure_had_template(tokenizer):
        notes.append("the model has no chat template: the default one is used, and kept in the adapter")
    files = _files(config)
    reports = {name: SplitReport() for name in _FILES}
    examples = {name: _examples(path, config, tokenizer, reports[name]) for name, path in files.items()}
    if "valid" not in files and config.valid_fraction > 0:
        examples["train"], examples["valid"] = seeded_split(examples["train"], config.valid_fraction, seed)
        notes.append(f"no validation file: {len(examples['valid'])} rows were held out by seed {seed}")
    _refuse_bad_rows(reports, config)
    if not examples["train"]:
        raise DataError("There is no row to train on.", where=str(config.path))
    for name, rows in examples.items():
        _count(reports[name], rows)
    report = DataReport(reports, _leaks(examples), notes)
    return Dataset(examples["train"], examples.get("valid", []), examples.get("test", []), report)


def ensure_had_template(tokenizer: Any) -> bool:
    """Whether the tokenizer brought a chat template; it has one afterwards in any case."""
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    had = bool(inner.chat_template) or bool(getattr(tokenizer, "has_chat_template", False))
    ensure_chat_template(tokenizer)
    return had


def seeded_split(
    examples: Sequence[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Hold out a share of the rows; equal prompts stay on one side. At least one row on either side.

    Which rows are held out depends on the seed and on their prompts, not on their order.
    """
    groups: dict[bytes, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(_prompt_key(example), []).append(index)
    if len(groups) < 2:
        return list(examples), []
    ranked = sorted(groups, key=lambda key: hashlib.sha256(key + seed.to_bytes(8, "little")).digest())
    wanted = max(1, round(len(examples) * fraction))
    held: set[int] = set()
    for key in ranked[:-1]:
        if len(held) >= wanted:
            break
        held.update(groups[key])
    train = [example for index, example in enumerate(examples) if index not in held]
    return train, [examples[index] for index in sorted(held)]


def _files(config: DataConfig) -> dict[str, Path]:
    if config.path is None:
        raise ConfigError("There is no data.", run="mlx-qlora train --data D …")
    path = Path(config.path).expanduser()
    if path.is_file():
        if path.suffix.lower() not in _SUFFIXES:
            raise DataError(f"A data file ends in {', '.join(_SUFFIXES)}.", where=str(path))
        return {"train": path}
    looks_local = path.suffix.lower() in _SUFFIXES or config.path.startswith((".", "/", "~"))
    if not path.is_dir() and (looks_local or config.path.count("/") != 1):
        raise DataError("There is no such file or folder.", where=config.path)
    folder = path if path.is_dir() else _from_hub(config.path)
    files = {name: file for name in _FILES if (file := _split_file(folder, name)) is not None}
    if "train" not in files:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise DataError(f"There is no train.jsonl or train.csv here; there is {there}.", where=str(folder))
    return files


def _split_file(folder: Path, split: str) -> Path | None:
    places = (folder, folder / "data")
    names = [f"{name}{suffix}" for name in _FILES[split] for suffix in _SUFFIXES]
    return next((place / name for place in places for name in names if (place / name).is_file()), None)


def _from_hub(name: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        patterns = [f"{folder}*{suffix}" for folder in ("", "data/") for suffix in _SUFFIXES]
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except (errors.RepositoryNotFoundError, errors.HFValidationError, errors.GatedRepoError):
        raise DataError(
            "There is no such folder here, and no such data set on the hub that you may read.",
            where=name,
            run="hf auth login   # if it is private",
        ) from None
    except (
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        errors.HfHubHTTPError,
        OSError,
    ) as error:
        raise DataError(
            f"The data set is not in the cache and the hub cannot be reached ({type(error).__name__}).",
            where=name,
            run=f"hf download {name} --repo-type dataset   # with a connection",
        ) from None


def _examples(path: Path, config: DataConfig, tokenizer: Any, report: SplitReport) -> list[Example]:
    records, bad = read_records(path, config.columns)
    report.bad += bad
    eos = tokenizer.eos_token_id
    examples = []
    for record in records:
        try:
            example = _example(record, config, tokenizer, eos, report)
        except BadRow as problem:
            report.bad.append(f"{record.source}: {problem}")
            continue
        if example is not None:
            examples.append(example)
    return examples


def _example(
    record: Record, config: DataConfig, tokenizer: Any, eos: int | None, report: SplitReport
) -> Example | None:
    rendered = render(tokenizer, record, config)
    example = truncated(rendered, config, eos, record.source)
    if example is None:
        report.dropped += 1
        return None
    if not example.targets_mask.any():
        raise BadRow(
            f"its prompt fills the window of {config.max_seq_length} tokens (the row has "
            f"{len(rendered.tokens)}), so it has no token to learn"
        )
    report.truncated += len(rendered.tokens) > config.max_seq_length
    return example


def _refuse_bad_rows(reports: dict[str, SplitReport], config: DataConfig) -> None:
    bad = [line for report in reports.values() for line in sorted(report.bad, key=_line_number)]
    if bad and not config.skip_bad_rows:
        raise DataError(
            f"{len(bad)} row(s) cannot be used:\n{listed(bad)}",
            where=str(config.path),
            run="mend them, or run the same command with --skip-bad-rows",
        )


def _line_number(problem: str) -> int:
    number = problem.split(":", 2)[1]
    return int(number) if number.isdigit() else 0


def _count(report: SplitReport, examples: Sequence[Example]) -> None:
    lengths = [len(example.tokens) for example in examples] or [0]
    report.rows, report.tokens = len(examples), sum(lengths) if examples else 0
    report.target_tokens = sum(int(example.targets_mask.sum()) for example in examples)
    report.duplicates = len(examples) - len({_key(example) for example in examples})
    p50, p90, p99 = (int(np.percentile(lengths, q)) for q in (50, 90, 99))
    report.lengths = (p50, p90, p99, max(lengths))


def _leaks(examples: dict[str, list[Example]]) -> list[str]:
    seen = {_key(example) for example in examples["train"]}
    return [
        example.source
        for name in ("valid", "test")
        for example in examples.get(name, [])
        if _key(example) in seen
    ]


def _key(example: Example) -> bytes:
    return example.tokens.tobytes()


def _prompt_key(example: Example) -> bytes:
    """What stands before the first target; of plain text, everything."""
    first = int(np.argmax(example.targets_mask))
    return example.tokens[: first if first > 1 else None].tobytes()
