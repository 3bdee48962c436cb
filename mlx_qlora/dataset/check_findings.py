"""What a look through a data set found: problems, warnings, notes, and the command for each."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from mlx_qlora.dataset.check import TINY_CHARACTERS, CheckedData, SplitReader
from mlx_qlora.dataset.finding import Finding
from mlx_qlora.dataset.packing import padded_length
from mlx_qlora.dataset.row_table import Repeats
from mlx_qlora.dataset.text_signs import SIGNS

UNUSABLE = {
    "bad_rows": ("rows that cannot be used", "mend them, or leave them out: {train} --skip-bad-rows"),
    "no_labels": (
        "rows without a token to learn, since the question fills the window",
        "{train} --set data.max_seq_length={longer}   # or --skip-bad-rows",
    ),
    "unmaskable": (
        "rows whose answers the chat template does not let tell from questions",
        "{train} --set data.loss_on=all   # trains on questions too",
    ),
}


def row_findings(checked: CheckedData, per_token: float, command: str) -> Iterator[Finding]:
    """Everything but languages.

    Args:
        per_token: Characters to a token, where lengths are in characters; 1 where they are in tokens.
        command: The training command that settings are added to.
    """
    yield from _unusable(checked, command)
    yield from _repeated(checked)
    yield from _lengths(checked, per_token, command)
    yield from _texts(checked)
    yield from _notes(checked, command)


def _unusable(checked: CheckedData, command: str) -> Iterator[Finding]:
    config = checked.config
    longer = padded_length(2 * config.max_seq_length)
    for name, reader in checked.splits.items():
        if (error := reader.unreadable) is not None:
            run = f"mlx-qlora data convert {shlex.quote(str(reader.records.path))} train.jsonl"
            yield Finding("problem", "unreadable", error.what, split=name, run=run)
        for kind, (what, run) in UNUSABLE.items():
            if kind in reader.seen:
                seen = reader.seen[kind]
                yield Finding(
                    "warning" if config.skip_bad_rows else "problem",
                    kind,
                    f"{what}: {seen.count}",
                    split=name,
                    count=seen.count,
                    first=tuple(seen.shown()),
                    run=run.format(train=command, longer=longer),
                )
    if checked.unused_columns:
        own = ", ".join(f"{name}: {config.columns[name]}" for name in sorted(checked.unused_columns))
        there = ", ".join(checked.splits["train"].check.columns[:12])
        what = f"data.columns names what no row has or needs ({own}); the columns are {there}"
        yield Finding("problem", "unused_columns", what)
    if not checked.splits["train"].check.rows and checked.splits["train"].unreadable is None:
        yield Finding("problem", "nothing_to_train_on", "there is no row to train on", split="train")


def _repeated(checked: CheckedData) -> Iterator[Finding]:
    split = f"mlx-qlora data split {shlex.quote(str(checked.config.path))} OUT"
    for name, reader in checked.splits.items():
        table = reader.table
        for code, repeats, what, run in (
            (
                "duplicates",
                table.duplicates(),
                "rows that say again what one before them says",
                "--drop-duplicates",
            ),
            (
                "near_duplicates",
                table.near_duplicates(),
                "rows that differ from one before them only by case, accents, punctuation or spacing",
                "--drop-duplicates",
            ),
            (
                "other_answers",
                table.other_answers(),
                "rows that ask what one before them asks, and answer it in another way",
                "",
            ),
        ):
            if repeats.count:
                yield Finding(
                    "note" if code == "other_answers" else "warning",
                    code,
                    f"{what}: {repeats.count}",
                    split=name,
                    count=repeats.count,
                    first=_pairs(reader, repeats),
                    run=f"{split} {run}" if run else None,
                )
    yield from _leaks(checked, split)


def _leaks(checked: CheckedData, split: str) -> Iterator[Finding]:
    train = checked.splits["train"].table
    for name in ("valid", "test"):
        if name not in checked.splits:
            continue
        reader = checked.splits[name]
        for code, lines, what in (
            (
                "leaked_rows",
                reader.table.rows_in(train),
                "rows that stand in train too, so that they show what was learned by heart",
            ),
            ("leaked_prompts", reader.table.prompts_in(train), "rows that ask what a row of train asks"),
        ):
            if lines:
                yield Finding(
                    "warning",
                    code,
                    f"{what}: {len(lines)}",
                    split=name,
                    count=len(lines),
                    first=tuple(f"{reader.check.file}:{line}" for line in lines[: reader.table.SHOWN]),
                    run=f"{split}   # keeps equal prompts on one side",
                )


def _lengths(checked: CheckedData, per_token: float, command: str) -> Iterator[Finding]:
    limit = checked.config.max_seq_length
    about = "" if checked.tokenizer is not None else "about "
    for name, reader in checked.splits.items():
        table, check = reader.table, reader.check
        cut = int((table.lengths > limit * per_token).sum())
        if not cut:
            continue
        share = cut / len(table)
        lost = ""
        if checked.tokenizer is not None:
            whole = (check.tokens or 0) + check.lost_tokens
            targets = (check.target_tokens or 0) + check.lost_targets
            share_lost, targets_lost = check.lost_tokens / whole, check.lost_targets / max(targets, 1)
            lost = f"; lost are {share_lost:.1%} of all tokens, {targets_lost:.1%} of those to be learned"
        wanted = padded_length(int(check.lengths["p99"] / per_token))
        yield Finding(
            "warning" if share >= 0.01 else "note",
            "too_long",
            f"rows longer than data.max_seq_length={limit}, the {100 * (1 - share):.1f}th percentile: "
            f"{about}{cut} ({share:.1%}){lost}",
            split=name,
            count=cut,
            run=f"{command} --set data.max_seq_length={wanted}   # keeps {about}99 % whole; takes more memory"
            if wanted > limit
            else None,
        )
        if lines := table.lines_longer_than(int(limit * per_token)):
            yield Finding(
                "warning",
                "very_long_answers",
                f"rows with an answer that alone is longer than {limit} tokens: {about}{len(lines)}",
                split=name,
                count=len(lines),
                first=tuple(f"{check.file}:{line}" for line in lines[: table.SHOWN]),
            )


def _texts(checked: CheckedData) -> Iterator[Finding]:
    told = {
        "tiny_answers": f"rows with an answer of fewer than {TINY_CHARACTERS} characters",
        "control_tokens_in_turns": "rows with a control token spelled in a turn, where it becomes letters",
        "control_tokens_in_text": "rows of plain text with a control token spelled, where it is meant",
        **{kind: what for kind, (what, _) in SIGNS.items()},
    }
    for name, reader in checked.splits.items():
        for kind, what in told.items():
            if kind in reader.seen:
                seen = reader.seen[kind]
                yield Finding(
                    "note" if kind.startswith("control_tokens") else "warning",
                    kind,
                    f"{what}: {seen.count}",
                    split=name,
                    count=seen.count,
                    first=tuple(seen.first),
                )


def _notes(checked: CheckedData, command: str) -> Iterator[Finding]:
    config, train = checked.config, checked.splits["train"]
    if "valid" not in checked.splits and config.valid_fraction > 0 and train.check.rows:
        yield Finding(
            "note",
            "no_validation_file",
            f"there is no validation file: a run holds out {config.valid_fraction:.0%} of it by its seed",
            run=f"mlx-qlora data split {shlex.quote(str(config.path))} OUT   # the same rows for every run",
        )
    schemas = {reader.check.schema for reader in checked.splits.values() if reader.check.schema}
    if len(schemas) > 1:
        yield Finding(
            "note", "schemas_differ", f"the files have different schemas: {', '.join(sorted(schemas))}"
        )
    if checked.tokenizer is not None and not checked.had_template and config.prompt_template is None:
        yield Finding(
            "note",
            "default_template",
            "the model has no chat template: User: … Assistant: … is used, and kept in the adapter",
            run=f"{command} --set 'data.prompt_template=…'   # writes prompts in another way",
        )


def _pairs(reader: SplitReader, repeats: Repeats) -> tuple[str, ...]:
    return tuple(
        f"{reader.check.file}:{line} as {reader.check.file}:{first}" for line, first in repeats.first
    )
