"""``mlx-qlora plan``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_qlora.commands.output import Json, gigabytes, print_json
from mlx_qlora.config import RunConfig, build_config, parse_assignment, read_config
from mlx_qlora.errors import ConfigError
from mlx_qlora.presets import preset as preset_tree

MOMENTS = {"loss": "the head and loss", "backward": "the backward pass", "update": "the optimizer's update"}
LABELS = {
    "interpreter": "Python and its libraries",
    "weights": "weights, frozen",
    "lora": "low-rank tensors and gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "attention": "attention",
    "loss": "head and loss",
    "cache": "buffers MLX keeps",
}


def plan(
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder of the base model; config.json is enough.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="mac-8gb, mac-16gb, mac-32gb or auto.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder, .jsonl or .csv file, or hub data set.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with the run's configuration.")] = None,
    memory: Annotated[str | None, typer.Option(help="Plan for a Mac with this much memory: 8GB.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="One key: --set training.batch_size=1")
    ] = None,
    advise: Annotated[
        bool, typer.Option("--advise", help="Which format fits best: to train on, and only to run.")
    ] = False,
    measured: Annotated[
        Path | None, typer.Option(help="With --advise: JSON of `compare`, of this model at best.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict a training run's peak memory, before anything is downloaded or loaded.

    Example: mlx-qlora plan --model mistralai/Mistral-7B-v0.1 --preset mac-8gb --memory 8GB

    Without --memory it is planned for this device. With --data its real lengths count; without, every row
    is taken to be full. With --advise every format is planned, and one is chosen for each use.
    """
    from mlx_qlora.memory.plan import parse_memory
    from mlx_qlora.training.planning import auto_preset, plan_run, work_of

    memory_bytes = parse_memory(memory) if memory is not None else None
    trees: list[dict[str, Any]] = [read_config(config)] if config else []
    trees += [{"model": {"path": model}}] if model else []
    trees += [{"data": {"path": data}}] if data else []
    trees += [parse_assignment(assignment) for assignment in assignments or []]
    if preset is None and config is None:
        preset = "auto"
    if preset == "auto":
        preset = auto_preset(build_config(*trees).model.path, memory_bytes=memory_bytes)
    run = build_config(*([preset_tree(preset)] if preset else []), *trees, where="command line")
    if measured is not None and not advise:
        raise ConfigError("--measured is for --advise.", run="mlx-qlora plan --advise --measured FILE …")
    if advise:
        _advise(run, memory_bytes, measured, preset, as_json=as_json)
        return
    planned = plan_run(run, memory_bytes=memory_bytes, work=work_of(run))
    changes = planned.changes()
    if as_json:
        print_json(
            {
                "fits": planned.plan.fits,
                "peak_bytes": planned.plan.peak_bytes,
                "needed_bytes": planned.plan.needed_bytes,
                "budget_bytes": planned.plan.budget.num_bytes,
                "budget_source": planned.plan.budget.source,
                "parts": planned.plan.parts,
                "phase": planned.plan.phase,
                "micro_batch": asdict(planned.batch),
                "preset": preset,
                "steps": planned.work.num_steps if planned.work else run.training.max_steps,
                "tokens_per_epoch": planned.work.tokens_per_epoch if planned.work else None,
                "changes": [asdict(change) for change in changes],
                "notes": list(planned.notes),
            }
        )
    else:
        _show(planned, changes, preset)


def _advise(
    run: RunConfig, memory_bytes: int | None, measured: Path | None, preset: str | None, *, as_json: bool
) -> None:
    from mlx_qlora.training.advice import advise, read_measured
    from mlx_qlora.training.planning import work_of

    known = read_measured(measured) if measured is not None else None
    found = advise(
        run, memory_bytes=memory_bytes, work=work_of(run), measured=known, source=f"--measured {measured}"
    )
    if as_json:
        print_json({**asdict(found), "preset": preset})
    else:
        _show_advice(found, str(run.model.path), preset)


def _show_advice(found: Any, model: str, preset: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    title = f"{model}: {gigabytes(found.budget.num_bytes)} may be used"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for number, column in enumerate(["format", "weights", "to run", "", "to train", "", "KL, nats", "ppl"]):
        table.add_column(column, justify="right" if number in (1, 2, 4, 6, 7) else "left", no_wrap=True)
    for option in found.options:
        quality = option.quality
        table.add_row(
            option.scheme,
            gigabytes(option.weights_bytes),
            gigabytes(option.run_bytes),
            "fits" if option.can_run else "no",
            gigabytes(option.train_bytes),
            "fits" if option.can_train else "no",
            f"{quality.divergence_nats:.4f}" if quality else "?",
            f"{quality.perplexity_change:+.1%}" if quality else "?",
        )
    console.print(table)
    for use, choice in (("To run", found.to_run), ("To train", found.to_train)):
        console.print(f"{use}: {choice.scheme or 'nothing'}, {choice.reason}", soft_wrap=True)
    how = f" with {preset}" if preset else ""
    console.print(
        f"  budget: {found.budget.source}; running is planned for {found.context_tokens} tokens of "
        f"conversation, training{how}",
        soft_wrap=True,
    )
    console.print(f"  quality: {found.source}", soft_wrap=True)
    for note in found.notes:
        console.print(f"  {note}", soft_wrap=True)


def _show(planned: Any, changes: list[Any], preset: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    plan = planned.plan
    title = "Predicted peak memory" + (f", {preset}" if preset else "")
    table = Table(title=title, title_justify="left", title_style="bold", show_footer=True)
    table.add_column("part", footer="peak")
    table.add_column("bytes", justify="right", footer=gigabytes(plan.peak_bytes))
    for part, num_bytes in plan.parts.items():
        table.add_row(LABELS[part], gigabytes(num_bytes))
    console = Console(highlight=False, markup=False)
    console.print(table)
    verdict = "It fits" if plan.fits else "It does not fit"
    console.print(
        f"{verdict}: it needs {gigabytes(plan.needed_bytes)} and may use {gigabytes(plan.budget.num_bytes)} "
        f"({plan.budget.source}).",
        soft_wrap=True,
    )
    batch = planned.batch
    console.print(
        f"The peak comes in {MOMENTS[plan.phase]}, with micro-batches of {batch.rows} x {batch.width} "
        "positions.",
        soft_wrap=True,
    )
    if planned.work is not None:
        work = planned.work
        console.print(
            f"{work.num_steps} steps, {work.steps_per_epoch} per epoch of {work.num_examples} rows with "
            f"{work.tokens_per_epoch} tokens.",
            soft_wrap=True,
        )
    for note in planned.notes:
        console.print(f"  {note}")
    for change in changes:
        console.print(
            f"{change.options}\n    {gigabytes(change.peak_bytes)}: {change.effect}", soft_wrap=True
        )
    if not plan.fits and not (changes and changes[-1].fits):
        console.print("No setting makes it fit: a smaller model, or fewer bits, would.")
