"""``mlx-qlora train``."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_qlora.commands.options import Backend, Hostfile, Hosts, Offload
from mlx_qlora.commands.output import Json, gigabytes, on_bytes, print_json, say
from mlx_qlora.config import RunConfig, build_config, parse_assignment, read_config
from mlx_qlora.presets import preset as preset_tree

if TYPE_CHECKING:
    from mlx_qlora.training.events import Observer, RunFinished
    from mlx_qlora.training.launcher import Launcher


def train(
    adapter_path: Annotated[Path, typer.Option(help="Folder for the adapter and its checkpoints.")],
    config: Annotated[Path | None, typer.Option(help="YAML file with the run's configuration.")] = None,
    model: Annotated[str | None, typer.Option(help="Hub id or folder of the base model.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder, .jsonl or .csv file, or hub data set.")] = None,
    preset: Annotated[str | None, typer.Option(help="mac-8gb, mac-16gb, mac-32gb or auto.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Go on without unusable rows.")
    ] = False,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="One key: --set training.learning_rate=1e-4")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Train although the memory plan does not fit.")
    ] = False,
    offload: Offload = False,
    processes: Annotated[
        int, typer.Option(help="Ranks on this machine that share every update's rows.", min=1)
    ] = 1,
    hosts: Hosts = None,
    hostfile: Hostfile = None,
    backend: Backend = "ring",
    max_restarts: Annotated[
        int,
        typer.Option(help="How often ranks that failed are started again from the last checkpoint.", min=0),
    ] = 3,
    as_json: Json = False,
) -> None:
    """Train an adapter on your data.

    Example: mlx-qlora train --model mistralai/Mistral-7B-v0.1 --data data/farense --preset mac-16gb
    --adapter-path adapters/farense

    Later wins: preset, USE_QUANTIZATION and QUANTIZATION_BITS in .env, in the environment, --config, --model
    and --data, --set. Stop it at any time; the same command with
    --resume goes on, and the result is the one of a run that was never stopped.

    With --processes or --hosts several ranks each do a part of every update; the updates are those of one
    process. A rank that dies or hangs is noticed, and all start again from the last checkpoint.
    """
    from mlx_qlora.training.display import ProgressDisplay
    from mlx_qlora.training.planning import auto_preset
    from mlx_qlora.training.report import PAGE, read_suggestions
    from mlx_qlora.training.run import resumed_config

    launcher = _launcher(processes, hosts, hostfile, backend)
    can_begin = model is not None or config is not None
    if resume and not (can_begin and not (adapter_path / "run.yaml").exists()):
        begun = resumed_config(adapter_path).model_dump(mode="json")
    else:
        begun = {}
        preset = preset if preset or config else "auto"
    trees = _trees(config, model, data, skip_bad_rows, assignments or [])
    trees += [{"model": {"offload": True}}] if offload else []
    if preset == "auto":
        preset = auto_preset(build_config(*trees, where="command line").model.path)
    trees = [*_environment(is_begun=bool(begun)), *trees]
    trees = [preset_tree(preset), *trees] if preset else trees
    run = build_config(begun, *trees, where="command line")
    with closing(ProgressDisplay(run.training.steps_per_report)) as display:
        result = _train(run, adapter_path, launcher, max_restarts, display, resume=resume, force=force)
    suggested = read_suggestions(result.adapter_path)
    if as_json:
        print_json({**asdict(result), "suggestions": suggested})
        return
    say()
    say(f"Trained {result.steps} steps, {result.tokens} tokens, in {result.seconds:.0f} s")
    say(f"  train loss  {result.train_loss_nats:.4f} nats per token")
    if result.val_loss_nats is not None:
        say(f"  val loss    {result.val_loss_nats:.4f} nats per token (best, step {result.best_step})")
    say(f"  peak memory {gigabytes(result.peak_memory_bytes)}")
    say(f"  adapter     {result.adapter_path}")
    say(f"  report      {result.adapter_path / PAGE}")
    if suggested:
        say("Suggestions, each with what was measured:")
    for suggestion in suggested:
        say(f"  {suggestion['reason']}:")
        say(f"    {suggestion['options'] or suggestion['advice']}")
    say(f'Run: python -m mlx_qlora.infer "…" --adapter-path {adapter_path}')


def _train(
    run: RunConfig,
    adapter_path: Path,
    launcher: Launcher | None,
    max_restarts: int,
    display: Observer,
    *,
    resume: bool,
    force: bool,
) -> RunFinished:
    if launcher is None:
        from mlx_qlora.training.run import train as train_here

        return train_here(
            run,
            adapter_path,
            resume=resume,
            observers=[display],
            on_bytes=on_bytes("Quantizing"),
            on_prefix_bytes=on_bytes("Frozen prefix"),
            on_init_bytes=on_bytes("Initialising the adapter"),
            force=force,
        ).finished
    from mlx_qlora.training.supervisor import train_on_ranks

    return train_on_ranks(
        run,
        adapter_path,
        launcher,
        resume=resume,
        force=force,
        observers=[display],
        on_bytes=on_bytes("Quantizing"),
        on_note=say,
        max_restarts=max_restarts,
    )


def _launcher(processes: int, hosts: str | None, hostfile: Path | None, backend: str) -> Launcher | None:
    """How ranks are started; None for a run of one process."""
    if hosts is None and hostfile is None and processes == 1 and backend == "ring":
        return None
    from mlx_qlora.training.distributed_hosts import launcher_for

    return launcher_for(processes, hosts=hosts, hostfile=hostfile, backend=backend)


def _environment(*, is_begun: bool) -> list[dict[str, Any]]:
    """What the environment says of a run that begins; one that goes on has its own configuration."""
    from mlx_qlora.quantization.environment import quantization_from_environment

    found = None if is_begun else quantization_from_environment()
    for note in found.notes if found else ():
        say(note)
    return [{"quantization": {"scheme": found.config.scheme}}] if found else []


def _trees(
    config: Path | None,
    model: str | None,
    data: str | None,
    skip_bad_rows: bool,
    assignments: list[str],
) -> list[dict[str, Any]]:
    trees = [read_config(config)] if config else []
    trees += [{"model": {"path": model}}] if model else []
    trees += [{"data": {"path": data}}] if data else []
    trees += [{"data": {"skip_bad_rows": True}}] if skip_bad_rows else []
    return trees + [parse_assignment(assignment) for assignment in assignments]
