"""The sections of a report that are tables and lists of what was measured."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_qlora.presets import GIB
from mlx_qlora.training.display import duration
from mlx_qlora.training.metrics import METRICS, Entry, best_validation, events_named, mean_loss
from mlx_qlora.training.report_blocks import Bars, Block, Heading, Listing, Paragraph, Row, Table
from mlx_qlora.training.samples import Sample
from mlx_qlora.training.suggestion import RunFacts

_MOST_BINS = 12
_PARTS = {
    "interpreter": "Python, libraries",
    "weights": "weights of the base",
    "lora": "adapter and its gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "attention": "attention scores",
    "loss": "logits and loss",
    "cache": "buffers MLX keeps",
}


@dataclass(frozen=True, kw_only=True)
class PlanSummary:
    """The memory plan of a run, as its report tells it; sizes in bytes."""

    parts: dict[str, int]
    needed_bytes: int
    """The predicted peak, without what MLX can give back."""
    budget_bytes: int
    budget_source: str
    phase: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a report tells besides the configuration and the metrics."""

    facts: RunFacts | None = None
    plan: PlanSummary | None = None
    samples: Sequence[Sample] = ()
    data_lines: Sequence[str] = ()
    """What is to be said about the rows, a sentence each."""


def losses(entries: Sequence[Entry]) -> list[Block]:
    """Training and validation loss, a row for each validation."""
    steps, validations, best = (
        events_named(entries, "StepDone"),
        events_named(entries, "Validated"),
        best_validation(entries),
    )
    ends = {v["step"]: v for v in validations}
    if steps:
        ends.setdefault(steps[-1]["step"], {"loss_nats": None})
    rows, begin = list[Row](), 0
    for end in sorted(ends):
        loss = ends[end]["loss_nats"]
        since = [s for s in steps if begin < s["step"] <= end and not s["skipped"]]
        train = mean_loss((s["loss_nats"], s["target_tokens"]) for s in since)
        perplexity = None if loss is None or loss > 50 else math.exp(loss)
        mark = "best" if best and best["step"] == end else ""
        rows.append((str(end), _number(train), _number(loss), _number(perplexity, 2), mark))
        begin = end
    shown = _thinned(rows)
    note = "Nats per target token; train is the mean over the updates since the validation before."
    if rows != shown:
        note += f" {len(rows) - len(shown)} rows are left out; all are in `{METRICS}`."
    return [
        Table(("step", "train loss", "validation loss", "validation perplexity", ""), shown),
        Paragraph(note),
    ]


def _thinned(rows: Sequence[Row], limit: int = 24) -> list[Row]:
    """At most about `limit` rows, evenly spread, with the first, the best and the last."""
    every = -(-len(rows) // limit) if rows else 1
    last = len(rows) - 1
    return [row for i, row in enumerate(rows) if i % every == 0 or i == last or row[-1] == "best"]


def cost_rows(entries: Sequence[Entry]) -> list[Row]:
    """Time, tokens and memory, with all that was not as planned."""
    steps, finished = events_named(entries, "StepDone"), events_named(entries, "RunFinished")
    memory = [s["memory"] for s in steps]
    training = sum(s["seconds"] for s in steps)
    tokens = sum(s["tokens"] for s in steps)
    resumed = [str(r["first_step"]) for r in events_named(entries, "RunStarted") if r["first_step"] > 0]
    rows: list[Row] = [
        ("updates", f"{len(steps)} ({sum(s['skipped'] for s in steps)} skipped)"),
        ("tokens read", f"{tokens:,} ({sum(s['target_tokens'] for s in steps):,} of them targets)"),
        ("time in updates", duration(training)),
        ("time in validation", duration(sum(v["seconds"] for v in events_named(entries, "Validated")))),
        ("tokens per second", f"{tokens / training:.0f}" if training else "–"),
        ("peak process footprint", _gib(_peak_bytes(entries))),
        ("MLX peak, without its cache", _gib(max((m["mlx_peak_bytes"] for m in memory), default=0))),
        ("swap growth, whole system", _gib(max((m["swap_growth_bytes"] for m in memory), default=0))),
        ("updates over the memory budget", str(len(events_named(entries, "MemoryPressure")))),
    ]
    rows += [("resumed after step", ", ".join(resumed))] if resumed else []
    back = [f"{r['from_step']} → {r['to_step']}" for r in events_named(entries, "RolledBack")]
    rows += [("went back, with half the rate", ", ".join(back))] if back else []
    if finished and finished[-1]["stopped_early"]:
        rows.append(("stopped early", f"best step {finished[-1]['best_step']}"))
    return rows


def _peak_bytes(entries: Sequence[Entry]) -> int:
    peaks = [s["memory"]["footprint_bytes"] for s in events_named(entries, "StepDone")]
    return max(peaks + [f["peak_memory_bytes"] for f in events_named(entries, "RunFinished")], default=0)


def planned_and_measured(plan: PlanSummary | None, entries: Sequence[Entry]) -> list[Block]:
    """The plan\'s parts and peak, beside the peak that was measured."""
    peak = _peak_bytes(entries)
    if plan is None or not peak:
        return []
    rows: list[Row] = [(_PARTS.get(name, name), _size(size), "") for name, size in plan.parts.items()]
    rows += [
        ("peak", _size(plan.needed_bytes), f"{_size(peak)} ({peak / plan.needed_bytes - 1:+.0%})"),
        (f"budget ({plan.budget_source})", _size(plan.budget_bytes), ""),
    ]
    note = (
        f"The plan was made before anything was loaded; its peak is in the {plan.phase} phase. Measured is "
        "the largest process footprint from the process's start to the run's end."
    )
    notes = [f"The plan took for granted: {'; '.join(plan.notes)}."] if plan.notes else []
    head = ("memory", "planned", "measured")
    return [Heading("Plan against measurement", 3), Table(head, rows), Paragraph(" ".join([note, *notes]))]


def data_section(entries: Sequence[Entry], told: Told) -> list[Block]:
    """What is known of the rows, and how long they are."""
    validations = events_named(entries, "Validated")
    lines = [f"{r['num_examples']} training examples" for r in events_named(entries, "RunStarted")[-1:]]
    lines += [f"{v['target_tokens']:,} target tokens in validation" for v in validations[-1:]]
    blocks: list[Block] = [Listing([*lines, *told.data_lines])]
    window = told.facts.window if told.facts else None
    if told.facts is not None and window is not None and window.lengths:
        longest = told.facts.config.data.max_seq_length
        full = sum(length >= longest for length in window.lengths)
        note = (
            f"`data.max_seq_length` is {longest}; {full} of {len(window.lengths)} rows "
            f"({full / len(window.lengths):.0%}) fill it."
        )
        blocks.append(Bars("tokens of a training row → rows", length_bins(window.lengths, longest), note))
    return blocks


def length_bins(lengths: Sequence[int], longest: int) -> list[tuple[str, int]]:
    """A histogram of row lengths over the whole window: ("33–64", count).

    Bins are as wide as a power of two; empty ones at the end are one.
    """
    width = 1 << (-(-longest // _MOST_BINS) - 1).bit_length()
    counts = Counter((min(length, longest) - 1) // width for length in lengths)
    last = max(counts, default=0)
    bins = [(f"{at * width + 1}–{min((at + 1) * width, longest)}", counts[at]) for at in range(last + 1)]
    rest = (last + 1) * width
    return [*bins, (f"{rest + 1}–{longest}", 0)] if rest < longest else bins


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


def _size(num_bytes: int) -> str:
    text = _gib(num_bytes) if num_bytes >= GIB else f"{num_bytes / 1024**2:.1f} MiB"
    return text.replace(" ", "\N{NO-BREAK SPACE}")
