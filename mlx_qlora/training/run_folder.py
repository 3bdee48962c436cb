"""The folder of a run: what is in it, whether a run may begin there, and what it was begun with."""

from __future__ import annotations

from pathlib import Path

from mlx_qlora.config import RunConfig, build_config, read_config, to_yaml
from mlx_qlora.errors import CheckpointError, ConfigError
from mlx_qlora.lora.adapter import WEIGHTS
from mlx_qlora.storage import make_folder, said_clearly, sweep, write_text
from mlx_qlora.training.metrics import METRICS
from mlx_qlora.training.trackers import TRACKED

RUN_FILE, CHECKPOINTS = "run.yaml", "checkpoints"


def resumed_config(adapter_path: str | Path) -> RunConfig:
    """The configuration that the run in `adapter_path` was started with.

    Raises:
        CheckpointError: no run was started there.
    """
    path = Path(adapter_path) / RUN_FILE
    if not path.is_file():
        raise CheckpointError(
            "There is no run to resume here.",
            where=str(path),
            run=f"mlx-qlora train --model M --data D --adapter-path {adapter_path}",
        )
    return build_config(read_config(path), where=str(path))


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same run, whatever folder it is resumed from; hub ids stay as they are.

    Raises:
        ConfigError: there is no model or no data.
    """
    for part, option in ((config.model, "--model"), (config.data, "--data")):
        if part.path is None:
            raise ConfigError(f"The run has no {option[2:]}.", run=f"mlx-qlora train {option} …")
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": _absolute(config.model.path)}),
            "data": config.data.model_copy(update={"path": _absolute(config.data.path)}),
        }
    )


def check_folder(folder: Path, *, resume: bool) -> None:
    """Refuse to begin a run where one was begun.

    Raises:
        CheckpointError: there is an adapter or a checkpoint already.
    """
    holds_a_run = (folder / WEIGHTS).exists() or any((folder / CHECKPOINTS).glob("step-*"))
    if holds_a_run and not resume:
        raise CheckpointError(
            "A run was already started here; nothing was touched.",
            where=str(folder),
            run=f"mlx-qlora train --resume --adapter-path {folder}   # or choose another --adapter-path",
        )


def begin_folder(folder: Path, config: RunConfig) -> None:
    """Make the folder ready for a new run of `config`.

    Raises:
        StorageError: it cannot be written.
    """
    with said_clearly(folder):
        make_folder(folder / CHECKPOINTS)
        for name in (METRICS, TRACKED):
            (folder / name).unlink(missing_ok=True)
    sweep(folder)
    write_text(folder / RUN_FILE, to_yaml(config))


def _absolute(path: str | None) -> str | None:
    return str(Path(path).resolve()) if path is not None and Path(path).exists() else path
