"""``mlx-qlora compare-training``."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_qlora.commands.output import Json, on_bytes, print_json, say
from mlx_qlora.config import RunConfig, build_config, parse_assignment, read_config
from mlx_qlora.errors import ConfigError, ModelError
from mlx_qlora.presets import preset as preset_tree

if TYPE_CHECKING:
    from mlx_qlora.studies.training_comparison import TrainingComparison
    from mlx_qlora.training.events import Event, Observer


def compare_training(
    model: Annotated[str | None, typer.Option(help="Hub id or folder of a 16- or 32-bit base model.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder, .jsonl or .csv file, or hub data set.")] = None,
    schemes: Annotated[
        str, typer.Option(help="Names with commas between; none is LoRA on the base as it is.")
    ] = "none,int8,int4,nf4",
    seeds: Annotated[str, typer.Option(help="Each scheme is trained with each of these: 0,1,2.")] = "0",
    repeat: Annotated[int, typer.Option(help="Each run so often; times are the median.", min=1)] = 1,
    config: Annotated[Path | None, typer.Option(help="YAML file with the runs' configuration.")] = None,
    preset: Annotated[str | None, typer.Option(help="mac-8gb, mac-16gb, mac-32gb or auto.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="One key: --set training.max_steps=200")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Rows the trained models are asked: test, valid or train.")
    ] = None,
    max_rows: Annotated[int | None, typer.Option(help="Score the first so many rows only.", min=1)] = None,
    max_questions: Annotated[
        int, typer.Option(help="Answers that are compared word for word, at most; 0: none.", min=0)
    ] = 100,
    generated_tokens: Annotated[int, typer.Option(help="Tokens that speed is measured on.", min=8)] = 64,
    output: Annotated[
        Path, typer.Option(help="Folder for adapters and figures; run again, it goes on.")
    ] = Path("adapters/compare-training"),
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Go on without unusable rows.")
    ] = False,
    as_json: Json = False,
) -> None:
    """LoRA on the 16-bit base beside QLoRA in each scheme: size, memory, time and quality, all measured.

    Example: mlx-qlora compare-training --model M --data data/farense --schemes none,int8,int4,nf4 --seeds 0,1

    Every run is a process of its own, one after another, on the same rows and with the same settings; so is
    the asking after it. Stopped, the same command goes on. Quantized bases stay in the cache, as after train.
    """
    from mlx_qlora.studies.training_comparison import Request, schemes_of
    from mlx_qlora.studies.training_comparison import compare_training as train_all
    from mlx_qlora.studies.training_figure import FIGURE, save_figure
    from mlx_qlora.studies.training_runs import Told
    from mlx_qlora.training.display import ProgressDisplay

    run = _configuration(model, data, config, preset, assignments or [], skip_bad_rows=skip_bad_rows)
    request = Request(
        config=run,
        schemes=schemes_of(schemes.split(",")),
        seeds=_numbers(seeds),
        repeat=repeat,
        split=split,
        max_rows=max_rows,
        max_questions=max_questions,
        generated_tokens=generated_tokens,
    )
    with closing(ProgressDisplay(run.training.steps_per_report)) as display:

        def on_phase(name: str, phase: str) -> None:
            display.close()
            say(f"{name}: {phase}")

        told = Told(phase=on_phase, event=_first_notes(display), num_bytes=on_bytes("  quantizing"))
        found = train_all(request, output, told)
    if save_figure(found, output / FIGURE):
        say(str(output / FIGURE))
    print_json(found.as_dict()) if as_json else _show(found)
    if not any(row.runs for row in found.rows):
        raise ModelError("None of these could be trained; the reasons stand beside them.")


def _first_notes(display: Observer) -> Observer:
    """Events to `display`; what is said of plan and data at a run's start, once for all of them."""
    from mlx_qlora.training.events import RunStarted

    said: set[str] = set()

    def show(event: Event) -> None:
        if isinstance(event, RunStarted):
            event = replace(event, notes=tuple(note for note in event.notes if note not in said))
            said.update(event.notes)
        display(event)

    return show


def _configuration(
    model: str | None,
    data: str | None,
    config: Path | None,
    preset: str | None,
    assignments: list[str],
    *,
    skip_bad_rows: bool,
) -> RunConfig:
    from mlx_qlora.training.planning import auto_preset

    trees: list[dict[str, Any]] = [read_config(config)] if config else []
    trees += [{"model": {"path": model}}] if model else []
    trees += [{"data": {"path": data}}] if data else []
    trees += [{"data": {"skip_bad_rows": True}}] if skip_bad_rows else []
    trees += [parse_assignment(assignment) for assignment in assignments]
    preset = preset if preset or config else "auto"
    if preset == "auto":
        preset = auto_preset(build_config(*trees, where="command line").model.path)
    return build_config(*([preset_tree(preset)] if preset else []), *trees, where="command line")


def _numbers(seeds: str) -> tuple[int, ...]:
    try:
        numbers = tuple(dict.fromkeys(int(seed) for seed in seeds.split(",") if seed.strip()))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 0:
        raise ConfigError("Seeds are whole numbers with commas between.", where="--seeds", run="--seeds 0,1")
    return numbers


def _show(found: TrainingComparison) -> None:
    from rich.console import Console
    from rich.table import Table

    from mlx_qlora.studies.training_table import legend, tables

    console = Console(highlight=False, markup=False)
    for title, columns, rows in tables(found):
        table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()
    for line in legend(found):
        console.print(line, soft_wrap=True)
