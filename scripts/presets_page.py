"""Plan every preset for the models people use, and put the tables into docs/PRESETS.md.

    python scripts/presets_page.py             # minutes: three formats are planned for each model and Mac
    python scripts/presets_page.py measured    # only the table of what docs/presets.json holds

The models are the folders of data/shapes: a config.json each, no weights. Tables stand between
``<!-- NAME -->`` and ``<!-- end -->``; what is written around them stays. docs/presets.json is written by
``benchmarks/seven_billion.py --record``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_qlora.config import RunConfig, build_config
from mlx_qlora.presets import preset
from mlx_qlora.training.planning import Change, RunPlan, config_source, plan_run
from mlx_qlora.weights.plan import skeleton

ROOT = Path(__file__).resolve().parents[1]
PAGE, MEASURED, SHAPES = (
    ROOT / "docs" / "PRESETS.md",
    ROOT / "docs" / "presets.json",
    ROOT / "data" / "shapes",
)
PLACE = re.compile(r"(<!-- (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
GIB = 1024**3
UTILISATION = 0.4
"""Share of a GPU's peak that training is taken to reach: assumed, not measured."""


@dataclass(frozen=True)
class Mac:
    """The smallest Mac of a size that the estimate of speed is for."""

    memory_gib: int
    chip: str
    teraflops: float
    """Its GPU's peak in float32, as Apple states it."""


MACS = {
    "mac-8gb": Mac(8, "M1, 8-core GPU", 2.6),
    "mac-16gb": Mac(16, "M2, 10-core GPU", 3.6),
    "mac-32gb": Mac(32, "M1 Pro, 16-core GPU", 5.2),
}
WIDTHS = {"none": "16 bits", "int8": "int8"}
"""Formats wider than the preset's, the widest first, and what they are called."""


@dataclass(frozen=True)
class Planned:
    """One model under one preset."""

    name: str
    num_parameters: int
    run: RunPlan
    widest: str
    """The format with most bits that fits too, of `WIDTHS`."""
    tokens_per_hour: float
    note: str


def flops_per_token(config: RunConfig) -> float:
    """Floating-point operations that training does for one token.

    6 for each weight of a linear layer and of the head (2 forward, 2 for the gradient of the input, 2 more to
    compute it again: gradient checkpointing, and the loss in chunks), and 8 · T · width of attention a layer
    for rows of T tokens. A frozen weight has no gradient; the low-rank layers, about 1 %, are left out.
    """
    model = skeleton(config_source(config))
    args = model.args
    head = int(args.vocab_size) * int(args.hidden_size)
    linears = sum(
        int(module.weight.size)
        for layer in model.layers
        for _, module in layer.named_modules()
        if "weight" in module and module["weight"].ndim == 2
    )
    heads = int(args.num_attention_heads)
    width = heads * int(getattr(args, "head_dim", None) or args.hidden_size // heads)
    attention = 8 * config.data.max_seq_length * width * len(model.layers)
    return 6.0 * (linears + head) + attention


def planned(folder: Path, name: str) -> Planned:
    """One model's row."""
    mac, note = MACS[name], ""
    tree = {"model": {"path": str(folder)}}
    config = build_config(preset(name), tree)
    memory = mac.memory_gib * GIB
    run = plan_run(config, memory_bytes=memory)
    if any("attention scores" in line for line in run.notes):
        note = "attention is not made in blocks"
    if not run.plan.fits:
        changes = run.changes()
        helps = changes and changes[-1].fits
        note = f"`{_options(changes)}`" if helps else "no setting makes it fit"
    narrow = config.quantization.scheme if run.plan.fits else "none fits"
    fitting = (title for scheme, title in WIDTHS.items() if _fits(config, scheme, memory))
    return Planned(
        name=folder.name,
        num_parameters=json.loads((folder / "config.json").read_text(encoding="utf-8"))["_num_parameters"],
        run=run,
        widest=next(fitting, narrow),
        tokens_per_hour=3600 * UTILISATION * mac.teraflops * 1e12 / flops_per_token(config),
        note=note,
    )


def _options(changes: list[Change]) -> str:
    """All changes together; the last of each key stands for those before it."""
    last = {each.partition("=")[0]: each for change in changes for each in change.assignments}
    return " ".join(f"--set {assignment}" for assignment in last.values())


def _fits(config: RunConfig, scheme: str, memory_bytes: int) -> bool:
    tree = config.model_dump(mode="json")
    wide = build_config(tree, {"quantization": {"scheme": scheme}})
    return plan_run(wide, memory_bytes=memory_bytes).plan.fits


def plan_table(name: str) -> str:
    """A preset's table in Markdown."""
    mac, config = MACS[name], build_config(preset(name))
    rows = sorted((planned(folder, name) for folder in _shapes()), key=lambda row: row.num_parameters)
    budget = rows[0].run.plan.budget.num_bytes / GIB
    training, length = config.training, config.data.max_seq_length
    update = f"{training.gradient_accumulation} × {training.batch_size} rows of {length} tokens"
    about = (
        f"{config.quantization.scheme}, rank {config.lora.rank} on {', '.join(config.lora.target_modules)}; "
        f"an update of {update}. The GPU may use {budget:.2f} GiB. Speed: {mac.chip}."
    )
    head = ("model", "parameters", "peak, GiB", "fits", "widest", "tokens/h, estimate", "")
    return f"{about}\n\n" + "\n".join(_markdown(head, [_cells(row) for row in rows])) + "\n"


def measured_table() -> str:
    """What ``benchmarks/seven_billion.py --record`` left."""
    found: dict[str, dict[str, Any]] = json.loads(MEASURED.read_text(encoding="utf-8"))
    rows = [
        (
            shape,
            name,
            str(result["steps"]),
            *(f"{result[key] / GIB:.2f}" for key in ("limit_bytes", "predicted_bytes", "peak_bytes")),
            f"{result['peak_bytes'] / result['predicted_bytes'] - 1:+.1%}",
            f"{result['seconds']:.0f}",
        )
        for shape, by_preset in found.items()
        for name, result in by_preset.items()
    ]
    head = ("shape", "preset", "steps", "limit, GiB", "predicted", "measured", "difference", "seconds")
    return "\n".join(_markdown(head, rows)) + "\n"


def main() -> None:
    """Rewrite the tables that are named, or all."""
    wanted = sys.argv[1:] or [*MACS, "measured"]
    if unknown := set(wanted) - {*MACS, "measured"}:
        sys.exit(f"no table: {', '.join(sorted(unknown))}; there are {', '.join(MACS)}, measured")

    def filled(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in wanted:
            return match[0]
        print(f"{name} …", file=sys.stderr, flush=True)
        return f"{match[1]}{measured_table() if name == 'measured' else plan_table(name)}{match[3]}"

    PAGE.write_text(PLACE.sub(filled, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def _shapes() -> Iterator[Path]:
    return (path.parent for path in sorted(SHAPES.glob("*/config.json")))


def _cells(row: Planned) -> tuple[str, ...]:
    speed = float(f"{row.tokens_per_hour:.2g}")
    return (
        row.name,
        f"{row.num_parameters / 1e9:.2f} B"
        if row.num_parameters >= 1e9
        else f"{row.num_parameters / 1e6:.0f} M",
        f"{row.run.plan.peak_bytes / GIB:.2f}",
        "yes" if row.run.plan.fits else "**no**",
        row.widest,
        f"{speed:,.0f}",
        row.note,
    )


def _size(num_parameters: int) -> str:
    is_large = num_parameters >= 1e9
    return f"{num_parameters / 1e9:.2f} B" if is_large else f"{num_parameters / 1e6:.0f} M"


def _markdown(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    rule = ("---", *["---:"] * (len(head) - 1))
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]


if __name__ == "__main__":
    main()
