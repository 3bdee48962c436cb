"""``mlx-qlora init``."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from mlx_qlora.commands.output import Json, print_json, say
from mlx_qlora.config import build_config
from mlx_qlora.config_page import SCHEMA_NAME, SCHEMA_TITLE, commented_yaml, run_schema
from mlx_qlora.errors import ConfigError
from mlx_qlora.presets import name_for
from mlx_qlora.presets import preset as preset_tree
from mlx_qlora.storage import make_folder, read_json, said_clearly, write_json, write_text


def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("run.yaml"),
    preset: Annotated[str, typer.Option(help="mac-8gb, mac-16gb, mac-32gb or auto.")] = "auto",
    model: Annotated[str | None, typer.Option(help="Hub id or folder of the base model.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder, .jsonl or .csv file, or hub data set.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of a run.yaml, and write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a run.yaml in which every key is explained, and its JSON schema, with which editors complete.

    Example: mlx-qlora init run.yaml --preset mac-16gb --model mistralai/Mistral-7B-v0.1 --data data/farense

    What is there is not replaced without --force. auto is the largest preset that this machine's memory, and
    the model, allow.
    """
    if schema:
        print(json.dumps(run_schema(), indent=2, ensure_ascii=False))
        return
    beside = path.with_name(SCHEMA_NAME)
    _check_free(path, beside, force=force)
    if preset == "auto" and model is not None:
        from mlx_qlora.training.planning import auto_preset

        preset = auto_preset(model)
    elif preset == "auto":
        preset = name_for(psutil.virtual_memory().total)
    trees: list[dict[str, Any]] = [preset_tree(preset)]
    trees += [{"model": {"path": model}}] if model else []
    trees += [{"data": {"path": data}}] if data else []
    config = build_config(*trees, where="command line")
    with said_clearly(path.parent):
        make_folder(path.parent)
    write_text(path, commented_yaml(config, name=str(path), preset=preset))
    write_json(beside, run_schema())
    if as_json:
        print_json({"path": path, "schema_path": beside, "config": config.model_dump(mode="json")})
        return
    say(f"Wrote {path}, and {beside} for editors")
    missing = [key for key, value in (("model.path", model), ("data.path", data)) if not value]
    if missing:
        say(f"Set {' and '.join(missing)} in it first")
    say(f"Run: mlx-qlora train --config {shlex.quote(str(path))} --adapter-path adapters/NAME")


def _check_free(path: Path, beside: Path, *, force: bool) -> None:
    """Refuse to replace what somebody may want to keep; a schema of ours is made again."""
    if path.is_dir():
        raise ConfigError("This is a folder.", where=str(path), run=f"mlx-qlora init {path / 'run.yaml'}")
    if force:
        return
    for file in (path, beside):
        if file.exists() and not (file == beside and _is_ours(file)):
            raise ConfigError(
                "There is such a file already; nothing was touched.",
                where=str(file),
                run=f"mlx-qlora init {path} --force   # to replace it",
            )


def _is_ours(file: Path) -> bool:
    try:
        found = read_json(file)
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("title") == SCHEMA_TITLE
