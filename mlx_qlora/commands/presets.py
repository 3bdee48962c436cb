"""``mlx-qlora presets``."""

from __future__ import annotations

from typing import Annotated, Any

import psutil
import typer

from mlx_qlora.commands.output import Json, print_json
from mlx_qlora.config import RunConfig, build_config, to_yaml
from mlx_qlora.presets import PRESETS, name_for, preset

_ROWS = {
    "batch size": "training.batch_size",
    "accumulation": "training.gradient_accumulation",
    "length, tokens": "data.max_seq_length",
    "checkpointing": "training.gradient_checkpointing",
    "rank": "lora.rank",
    "alpha": "lora.alpha",
    "modules": "lora.target_modules",
    "learning rate": "training.learning_rate",
    "warm-up, updates": "training.warmup_steps",
    "epochs": "training.num_epochs",
}


def presets(
    yaml_of: Annotated[
        str | None, typer.Option("--yaml", metavar="NAME", help="Print this preset as a whole configuration.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show settings for Macs of three sizes; auto is the largest that this machine's memory allows.

    Example: mlx-qlora presets --yaml mac-16gb > run.yaml
    """
    if yaml_of is not None:
        config = build_config(preset(yaml_of), where=f"preset {yaml_of}")
        if as_json:
            print_json(config.model_dump(mode="json"))
        else:
            print(to_yaml(config), end="")
        return
    configs = {name: build_config(preset(name), where=f"preset {name}") for name in PRESETS}
    chosen = name_for(psutil.virtual_memory().total)
    if as_json:
        print_json({"presets": {name: preset(name) for name in PRESETS}, "auto": chosen})
    else:
        _show(configs, chosen)


def _show(configs: dict[str, RunConfig], chosen: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Presets", title_justify="left", title_style="bold")
    table.add_column("")
    for name in configs:
        table.add_column(f"{name} here:\n{chosen}" if name == "auto" else name, justify="right")
    for label, key in _ROWS.items():
        table.add_row(label, *(_cell(config, key) for config in configs.values()))
    console = Console()
    console.print(table)
    console.print("A whole configuration: mlx-qlora presets --yaml mac-16gb", markup=False, highlight=False)


def _cell(config: RunConfig, key: str) -> str:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return "\n".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
