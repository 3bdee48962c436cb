"""report.md: what was run, what came out, and how to use it."""

from __future__ import annotations

import math
import platform
import shlex
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mlx.core as mx

from mlx_qlora.config import RunConfig, to_yaml
from mlx_qlora.memory.monitor import device_limit_bytes
from mlx_qlora.presets import GIB
from mlx_qlora.storage import write_text
from mlx_qlora.training.display import duration
from mlx_qlora.training.metrics import METRICS, Entry, best_validation, events_named, mean_loss, read_metrics
from mlx_qlora.training.plots import PICTURE, PLOTS_HINT, plot_losses

REPORT = "report.md"

Row = tuple[str, ...]


def write_report(folder: str | Path, config: RunConfig, data_lines: Sequence[str] = ()) -> Path:
    """Draw loss.png and write report.md, from the metrics.jsonl in the adapter's folder.

    Args:
        folder: The adapter.
        config: The run's configuration.
        data_lines: What is to be said about the rows, a sentence each.
    """
    folder = Path(folder)
    has_picture = plot_losses(folder / METRICS, folder / PICTURE)
    entries = read_metrics(folder / METRICS)
    picture = f"![Loss, learning rate and memory over the run]({PICTURE})"
    sections = [
        f"# {folder.name}",
        _headline(config, entries),
        picture if has_picture else f"There is no picture of the loss: it needs matplotlib, `{PLOTS_HINT}`.",
        "## Use it",
        f'```\npython -m mlx_qlora.infer "…" --adapter-path {shlex.quote(str(folder))}\n```',
        "## Losses",
        _loss_table(entries),
        "## Time and memory",
        _table(("", ""), _cost_rows(entries)),
        "## Data",
        "\n".join(f"- {line}" for line in [*_data_counts(entries), *data_lines]),
        "## Configuration",
        f"```yaml\n{to_yaml(config)}```",
        "## Environment",
        _table(("", ""), environment().items()),
    ]
    write_text(folder / REPORT, "\n\n".join(sections) + "\n")
    return folder / REPORT


def environment() -> dict[str, str]:
    """Versions and device, by name."""
    packages = {name: _version(name) for name in ("mlx-qlora", "mlx", "mlx-lm")}
    device = f"{mx.default_device().type.name}, {mx.device_info().get('device_name', platform.machine())}"
    return {
        **packages,
        "Python": platform.python_version(),
        "system": platform.platform(),
        "device": device,
        "device memory limit": f"{device_limit_bytes() / GIB:.1f} GiB",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _headline(config: RunConfig, entries: Sequence[Entry]) -> str:
    steps, best = events_named(entries, "StepDone"), best_validation(entries)
    done = f"{steps[-1]['step']} updates" if steps else "no update yet"
    text = (
        f"A rank-{config.lora.rank} LoRA adapter for `{config.model.path}` "
        f"({config.quantization.scheme}), {done}."
    )
    if best:
        text += f" Best validation loss: **{best['loss_nats']:.4f}** nats per token, at step {best['step']}."
    return text


def _loss_table(entries: Sequence[Entry]) -> str:
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
    head = ("step", "train loss", "validation loss", "validation perplexity", "")
    return f"{_table(head, shown)}\n\n{note}"


def _thinned(rows: Sequence[Row], limit: int = 24) -> list[Row]:
    """At most about `limit` rows, evenly spread, with the first, the best and the last."""
    every = -(-len(rows) // limit) if rows else 1
    last = len(rows) - 1
    return [row for i, row in enumerate(rows) if i % every == 0 or i == last or row[-1] == "best"]


def _cost_rows(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    steps, finished = events_named(entries, "StepDone"), events_named(entries, "RunFinished")
    memory = [s["memory"] for s in steps]
    training = sum(s["seconds"] for s in steps)
    tokens = sum(s["tokens"] for s in steps)
    peaks = [m["footprint_bytes"] for m in memory] + [f["peak_memory_bytes"] for f in finished]
    resumed = [str(r["first_step"]) for r in events_named(entries, "RunStarted") if r["first_step"] > 0]
    rows = [
        ("updates", f"{len(steps)} ({sum(s['skipped'] for s in steps)} skipped)"),
        ("tokens read", f"{tokens:,} ({sum(s['target_tokens'] for s in steps):,} of them targets)"),
        ("time in updates", duration(training)),
        ("time in validation", duration(sum(v["seconds"] for v in events_named(entries, "Validated")))),
        ("tokens per second", f"{tokens / training:.0f}" if training else "–"),
        ("peak process footprint", _gib(max(peaks, default=0))),
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


def _data_counts(entries: Sequence[Entry]) -> list[str]:
    validations = events_named(entries, "Validated")
    lines = [f"{r['num_examples']} training examples" for r in events_named(entries, "RunStarted")[-1:]]
    return lines + [f"{v['target_tokens']:,} target tokens in validation" for v in validations[-1:]]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
