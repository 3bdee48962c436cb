"""report.md and report.html: what was run, what came out, what could be better, and how to use it."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qlora.config import LoraConfig, RunConfig, to_yaml
from mlx_qlora.memory.monitor import device_limit_bytes
from mlx_qlora.presets import GIB
from mlx_qlora.storage import plain_json, read_json, write_json, write_text
from mlx_qlora.training.metrics import METRICS, Entry, best_validation, events_named, read_metrics
from mlx_qlora.training.plots import PICTURE, PLOTS_HINT, plot_losses, svg_of_losses
from mlx_qlora.training.report_blocks import (
    Block,
    Code,
    Exchange,
    Heading,
    Listing,
    Paragraph,
    Picture,
    Table,
    to_markdown,
)
from mlx_qlora.training.report_html import to_html
from mlx_qlora.training.report_sections import (
    Told,
    cost_rows,
    data_section,
    length_bins,
    losses,
    planned_and_measured,
)
from mlx_qlora.training.samples import MAX_SECONDS, Sample
from mlx_qlora.training.suggestion import RunFacts, Suggestion
from mlx_qlora.training.suggestions import command, suggestions

REPORT, PAGE, DATA = "report.md", "report.html", "report.json"


def write_report(folder: str | Path, config: RunConfig, told: Told | None = None) -> tuple[Suggestion, ...]:
    """Draw loss.png; write report.md, report.html and report.json, from the metrics.jsonl in the folder.

    Args:
        folder: The adapter.
        config: The run's configuration.

    Returns:
        What is suggested for the next run.
    """
    folder, told = Path(folder), told or Told()
    entries = read_metrics(folder / METRICS)
    found = suggestions(entries, told.facts or RunFacts(config=config))
    planned = told.plan.needed_bytes if told.plan else None
    has_picture = plot_losses(folder / METRICS, folder / PICTURE, predicted_bytes=planned)
    svg = svg_of_losses(entries, predicted_bytes=planned) if has_picture else None
    blocks = [
        Heading(folder.name, 1),
        Paragraph(_headline(config, entries)),
        *_suggested(folder, entries, found),
        Picture(PICTURE, "Loss, learning rate and memory over the run", svg)
        if svg
        else Paragraph(f"There is no picture of the loss: it needs matplotlib, `{PLOTS_HINT}`."),
        Heading("Use it"),
        Code(f'python -m mlx_qlora.infer "…" --adapter-path {shlex.quote(str(folder))}'),
        *_answered(told.samples),
        Heading("Losses"),
        *losses(entries),
        Heading("Time and memory"),
        Table(("", ""), cost_rows(entries)),
        *planned_and_measured(told.plan, entries),
        Heading("Data"),
        *data_section(entries, told),
        Heading("Configuration"),
        Code(to_yaml(config), "yaml"),
        Heading("Environment"),
        Table(("", ""), list(environment().items()), numbers_from=9),
    ]
    write_text(folder / REPORT, to_markdown(blocks))
    write_text(folder / PAGE, to_html(blocks, f"{folder.name} · mlx-qlora"))
    write_json(folder / DATA, _data_file(told, found, folder))
    return found


def read_suggestions(folder: str | Path) -> list[dict[str, Any]]:
    """What the report in an adapter's folder suggests; nothing where there is none that can be read."""
    try:
        found = read_json(Path(folder) / DATA)["suggestions"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return found if isinstance(found, list) else []


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


def variant_name(lora: LoraConfig) -> str:
    """What kind of adapter it is, as a person calls it: LoRA, rsLoRA, DoRA; and how it began."""
    kind = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA"}[lora.variant]
    begun = {"default": "", "pissa": ", begun with PiSSA", "loftq": ", begun with LoftQ"}[lora.init]
    return kind + begun


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _headline(config: RunConfig, entries: Sequence[Entry]) -> str:
    steps, best = events_named(entries, "StepDone"), best_validation(entries)
    done = f"{steps[-1]['step']} updates" if steps else "no update yet"
    kind, _, begun = variant_name(config.lora).partition(", ")
    text = (
        f"A rank-{config.lora.rank} {kind} adapter for `{config.model.path}` "
        f"({config.quantization.scheme}){f', {begun}' if begun else ''}, {done}."
    )
    if best:
        text += f" Best validation loss: **{best['loss_nats']:.4f}** nats per token, at step {best['step']}."
    return text


def _suggested(folder: Path, entries: Sequence[Entry], found: Sequence[Suggestion]) -> list[Block]:
    if not events_named(entries, "StepDone"):
        return []
    if not found:
        return [Heading("Suggestions"), Paragraph("None: no rule found anything to change.")]
    items = [f"{s.reason}: `{s.options}`" if s.assignments else f"{s.reason}: {s.advice}" for s in found]
    blocks: list[Block] = [Heading("Suggestions"), Listing(items)]
    if any(s.assignments for s in found):
        blocks += [Paragraph("Again, with all of them, into another folder:"), Code(command(folder, found))]
    return blocks


def _answered(samples: Sequence[Sample]) -> list[Block]:
    if not samples:
        return []
    blocks: list[Block] = [
        Heading("Answers"),
        Paragraph(
            "Held-out prompts, answered greedily by one model with the adapter switched off and on, within "
            f"{MAX_SECONDS:.0f} s. So few say nothing about quality: `mlx-qlora evaluate` does."
        ),
    ]
    for sample in samples:
        parts = (
            ("prompt, as the model reads it", sample.prompt),
            ("the row's own answer", sample.expected),
            ("base", sample.base),
            ("with the adapter", sample.adapted),
        )
        blocks.append(Exchange(sample.source, parts))
    return blocks


def _data_file(told: Told, found: Sequence[Suggestion], folder: Path) -> dict[str, Any]:
    window = told.facts.window if told.facts else None
    longest = told.facts.config.data.max_seq_length if told.facts else 0
    tree = {
        "suggestions": [{**asdict(s), "options": s.options} for s in found],
        "again": command(folder, found) if any(s.assignments for s in found) else None,
        "samples": [asdict(sample) for sample in told.samples],
        "plan": asdict(told.plan) if told.plan else None,
        "lengths": [list(each) for each in length_bins(window.lengths, longest)] if window else None,
        "environment": environment(),
    }
    plain: dict[str, Any] = plain_json(tree)
    return plain
