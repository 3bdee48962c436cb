"""What a comparison of training runs says, as tables and sentences: for a terminal, and for a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import fmean, median, stdev

from mlx_qlora.studies.training_comparison import Row, TrainingComparison
from mlx_qlora.studies.training_runs import TrainedVariant

Table = tuple[str, list[str], list[list[str]]]
"""Title, columns, rows."""
Figure = Callable[[TrainedVariant], float | None]
"""One number of a run."""


ROUGH_SPREAD = 0.1
"""Times that differ by more among equal runs tell of the machine's other work."""


def tables(found: TrainingComparison) -> Iterator[Table]:
    """Size and memory, time, quality: one after the other, each 80 columns wide at most."""
    rows = [row for row in found.rows if row.runs]
    if not rows:
        return
    size = f"{rows[0].base.num_parameters / 1e6:.2f} M parameters" if rows[0].base else ""
    yield (
        f"{found.model}, {size}",
        ["MiB", "file", "base", "train peak", "MLX's", "ask peak", "adapter", "on disk"],
        [_memory(row) for row in rows],
    )
    yield (
        "",
        ["time", "train s", "s/step", "train tokens/s", "answer tokens/s"],
        [_time(row) for row in rows],
    )
    yield (
        "",
        ["quality", "train loss", "val loss", f"{split_of(found) or 'asked'} loss", "exact match"],
        [_quality(row) for row in rows],
    )


def legend(found: TrainingComparison) -> Iterator[str]:
    """What the columns mean, on what they were measured, and what was not."""
    runs = [run for row in found.rows for run in row.runs]
    if runs:
        yield from _what_was_trained(found)
        yield from _what_was_asked(found)
        yield (
            "file: the base's weights on disk; base: its arrays in memory; train and ask peak: of the whole "
            "process, loading included; MLX's: of its arrays in any update; on disk: file and adapter."
        )
        yield _times(found)
        yield from _scatter(found)
    for row in found.rows:
        for problem in row.problems:
            yield f"{name_of(row)}: {problem}"


def name_of(row: Row) -> str:
    """A row's method and format: LoRA bf16, QLoRA int4."""
    if not row.is_lora:
        return f"QLoRA {row.scheme}"
    stored = row.base.stored_as if row.base else "as it is"
    return f"LoRA {({'bfloat16': 'bf16', 'float16': 'fp16', 'float32': 'fp32'}).get(stored, stored)}"


def split_of(found: TrainingComparison) -> str | None:
    """Which rows were asked about; None where none were."""
    return next(
        (run.answers.split for row in found.rows for run in row.runs if run.answers is not None), None
    )


def values(row: Row, figure: Figure) -> list[float]:
    """One figure of each run of a row that has it."""
    return [value for run in row.runs if (value := figure(run)) is not None]


def middle(row: Row, figure: Figure) -> float | None:
    """The median of a row's runs: for times and memory."""
    numbers = values(row, figure)
    return median(numbers) if numbers else None


def largest(row: Row, figure: Figure) -> float | None:
    """The largest of a row's runs: for peaks."""
    return max(values(row, figure), default=None)


def exact_match(run: TrainedVariant) -> float | None:
    """Share of answers that are word for word the expected ones."""
    return run.answers.exact_match if run.answers else None


def answer_speed(run: TrainedVariant) -> float | None:
    """Tokens per second, answering."""
    return run.answers.tokens_per_second if run.answers else None


def asked_loss(run: TrainedVariant) -> float | None:
    """Of the rows that were asked about."""
    return run.answers.loss_nats if run.answers else None


def spread_of_times(found: TrainingComparison) -> float | None:
    """By what share of their median the seconds of a step differ among a row's runs; None: one run each."""
    all_seconds = [values(row, lambda run: run.training.seconds_per_step) for row in found.rows if row.runs]
    repeated = [seconds for seconds in all_seconds if len(seconds) > 1]
    return max(((max(each) - min(each)) / median(each) for each in repeated), default=None)


def are_times_rough(found: TrainingComparison) -> bool:
    """Whether nothing shows that the times can be trusted: one run each, or runs that differ."""
    spread = spread_of_times(found)
    return spread is None or spread > ROUGH_SPREAD


def _memory(row: Row) -> list[str]:
    disk, memory = (row.base.bytes_on_disk, row.base.bytes_in_memory) if row.base else (None, None)
    adapter = middle(row, lambda run: run.training.adapter_bytes)
    return [
        name_of(row),
        _mib(disk),
        _mib(memory),
        _mib(largest(row, lambda run: run.training.peak_footprint_bytes)),
        _mib(largest(row, lambda run: run.training.mlx_peak_bytes)),
        _mib(largest(row, lambda run: run.answers.peak_footprint_bytes if run.answers else None)),
        _mib(adapter),
        _mib(disk + adapter if disk is not None and adapter is not None else None),
    ]


def _time(row: Row) -> list[str]:
    return [
        name_of(row),
        _figure(middle(row, lambda run: run.training.seconds)),
        _figure(middle(row, lambda run: run.training.seconds_per_step)),
        _figure(middle(row, lambda run: run.training.tokens_per_second)),
        _figure(middle(row, answer_speed)),
    ]


def _quality(row: Row) -> list[str]:
    losses: Sequence[Figure] = (
        lambda run: run.training.train_loss_nats,
        lambda run: run.training.val_loss_nats,
        asked_loss,
    )
    exact = values(row, exact_match)
    return [
        name_of(row),
        *(_with_deviation(values(row, figure)) for figure in losses),
        "–" if not exact else f"{fmean(exact):.1%}" + (f" ±{stdev(exact):.1%}" if len(exact) > 1 else ""),
    ]


def _what_was_trained(found: TrainingComparison) -> Iterator[str]:
    run = next(run for row in found.rows for run in row.runs)
    dtype = next(row.base.dtype for row in found.rows if row.base)
    seeds = ", ".join(map(str, found.seeds))
    yield (
        f"{run.training.num_steps} steps on {found.data}, seed{'s' if len(found.seeds) > 1 else ''} {seeds}; "
        f"{run.training.trainable_parameters:,} trained parameters; computed in {dtype}."
    )
    if len(found.seeds) > 1:
        yield "losses (nats per labelled token), exact match: the mean over seeds ± one standard deviation."


def _what_was_asked(found: TrainingComparison) -> Iterator[str]:
    answers = next((run.answers for row in found.rows for run in row.runs if run.answers), None)
    if answers is None:
        return
    yield (
        f"{answers.split} loss: {answers.num_rows} rows, {answers.target_tokens} labelled tokens; "
        f"exact match: of {answers.num_questions} answers."
    )
    if answers.split == "train":
        yield "These are rows they were trained on: a test.jsonl beside train.jsonl would say more."


def _times(found: TrainingComparison) -> str:
    counts = {len(row.runs) for row in found.rows if row.runs}
    spread = spread_of_times(found)
    if spread is None:
        return "Times are of one run each: rough. --repeat 3 shows how far they scatter."
    how_many = " or ".join(map(str, sorted(counts)))
    said = f"Times are the median of {how_many} runs; a step's differ by up to {spread:.0%} among them"
    return f"{said}: rough." if are_times_rough(found) else f"{said}."


def _scatter(found: TrainingComparison) -> Iterator[str]:
    """Where the same run did not come to the same loss."""
    for row in found.rows:
        for seed in found.seeds:
            losses = {run.training.train_loss_nats for run in row.runs if run.seed == seed} - {None}
            if len(losses) > 1:
                apart = max(map(float, losses)) - min(map(float, losses))  # type: ignore[arg-type]
                yield f"{name_of(row)}, seed {seed}: repeated, its training loss came out {apart:.2g} apart."


def _mib(num_bytes: float | None) -> str:
    if num_bytes is None:
        return "–"
    mib = num_bytes / 1024**2
    return f"{mib:.2f}" if mib < 10 else f"{mib:,.0f}"


def _figure(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _with_deviation(losses: Sequence[float]) -> str:
    if not losses:
        return "–"
    return f"{fmean(losses):.4f}" + (f" ±{stdev(losses):.4f}" if len(losses) > 1 else "")
