"""``mlx-qlora compare``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_qlora.commands.output import Json, on_bytes, print_json, say
from mlx_qlora.errors import ModelError

ALL = "fp16,int8,int6,int5,int4,int3,int2,mxfp8,mxfp4,nvfp4,nf4,nf4-dq"


def compare(
    model: Annotated[str, typer.Option(help="Hub id or folder of a 16- or 32-bit model.")],
    data: Annotated[str, typer.Option(help="Folder, .jsonl or .csv file, or hub data set.")],
    schemes: Annotated[
        str, typer.Option(help="Names with commas between: fp16,int8,int4-g32,nf4-dq; all of them if none.")
    ] = ALL,
    split: Annotated[
        str | None, typer.Option(help="train, valid or test; the last of these that has rows.")
    ] = None,
    reference: Annotated[
        str, typer.Option(help="What the others are compared with, where the float model is too large: int8.")
    ] = "none",
    adapter_path: Annotated[
        Path | None, typer.Option(help="Compare with this adapter on every scheme.")
    ] = None,
    max_rows: Annotated[int | None, typer.Option(help="Score the first so many rows only.", min=1)] = None,
    max_seq_length: Annotated[int, typer.Option(help="Tokens per row, at most.", min=2)] = 512,
    batch_size: Annotated[int, typer.Option(help="Rows at once.", min=1)] = 4,
    generated_tokens: Annotated[int, typer.Option(help="Tokens that speed is measured on.", min=8)] = 64,
    max_questions: Annotated[
        int, typer.Option(help="Answers that are compared word for word, at most; 0: none.", min=0)
    ] = 100,
    loss_on: Annotated[str, typer.Option(help="Tokens that are scored: assistant or all.")] = "assistant",
    figure: Annotated[Path | None, typer.Option(help="Draw quality against size: FILE.png.")] = None,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Go on without unusable rows.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Allow the model folder's own code.")] = False,
    as_json: Json = False,
) -> None:
    """Measure formats of one model side by side: size, memory, speed, and what becomes of its answers.

    Example: mlx-qlora compare --model M --schemes fp16,int8,int4,nf4-dq --data data/farense --figure out.png

    Each is measured in a process of its own. KL is the mean divergence from the float model, in nats per
    labelled token. Peak memory is of loading and generating.
    """
    from mlx_qlora.config import DataConfig, build_config
    from mlx_qlora.inference.comparison import Request
    from mlx_qlora.inference.comparison import compare as measure_all
    from mlx_qlora.inference.comparison_figure import check_figure, save_figure

    if figure is not None:
        check_figure(figure)
    keys = {"path": data, "max_seq_length": max_seq_length, "loss_on": loss_on}
    checked: DataConfig = build_config(
        {"data": {**keys, "skip_bad_rows": skip_bad_rows}}, where="command line"
    ).data
    request = Request(
        model=model,
        schemes=tuple(name.strip() for name in schemes.split(",") if name.strip()),
        data=checked.model_dump(mode="json", exclude_unset=True),
        split=split,
        reference=reference,
        adapter_path=str(adapter_path) if adapter_path is not None else None,
        revision=revision,
        trust_remote_code=trust_remote_code,
        max_rows=max_rows,
        batch_size=batch_size,
        generated_tokens=generated_tokens,
        max_questions=max_questions,
    )
    found = measure_all(
        request, on_phase=lambda name, phase: say(f"{name}: {phase}"), on_bytes=on_bytes("  quantizing")
    )
    if figure is not None and any(row.measured for row in found.rows):
        save_figure(found, figure)
        say(f"{figure}")
    print_json(found.as_dict()) if as_json else _show(found)
    asked = [row for row in found.rows if row.scheme in request.schemes]
    if all(row.measured is None for row in asked):
        raise ModelError("None of these schemes could be measured; the reasons stand beside them.")


def _show(found: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    name = f"{found.model}, {found.num_parameters / 1e6:.2f} M parameters"
    measured = [row for row in found.rows if row.measured is not None]
    has_answers = any(row.measured.exact_match is not None for row in measured)
    quality = ["perplexity", "change", "KL, nats", "same token", *(["exact"] if has_answers else [])]
    for title, columns, cells_of in (
        (name, ["MiB on disk", "bits/weight", "peak MiB", "MLX MiB", "load s", "tokens/s"], _cost),
        ("", quality, partial(_quality, found)),
    ):
        table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for number, column in enumerate(["scheme", *columns]):
            table.add_column(column, justify="right" if number else "left", no_wrap=True)
        for row in measured:
            table.add_row(row.scheme, *cells_of(row)[: len(columns)])
        console.print(table)
        console.print()
    for line in _legend(found):
        console.print(line, soft_wrap=True)


def _cost(row: Any) -> list[str]:
    measured = row.measured
    return [
        _mib(row.bytes_on_disk),
        f"{row.bits_per_weight:.2f}",
        _mib(measured.peak_footprint_bytes),
        _mib(measured.mlx_peak_bytes),
        f"{measured.load_seconds:.1f}",
        f"{measured.tokens_per_second:.0f}",
    ]


def _quality(found: Any, row: Any) -> list[str]:
    measured = row.measured
    against = (
        ["", "", ""]
        if row.is_reference
        else [
            _percent(found.perplexity_change(row)),
            _nats(measured.divergence_nats),
            f"{measured.agreement:.1%}",
        ]
    )
    exact = "" if measured.exact_match is None else f"{measured.exact_match:.0%}"
    return [f"{row.perplexity:.4g}", *against, exact]


def _legend(found: Any) -> list[str]:
    reference = found.reference
    measured = reference.measured
    lines = [
        f"{measured.num_rows} rows of {found.data} ({measured.split}), "
        f"{measured.target_tokens} labelled tokens.",
        f"change, KL and same (likeliest next) token: against {reference.scheme}, stored in "
        f"{reference.stored_as}; computed in {measured.dtype}.",
        "peaks: of the process, Python and its libraries included, and of MLX's arrays, while it loaded and "
        "generated.",
    ]
    if measured.exact_match is not None:
        lines.append(f"exact: of {measured.num_questions} answers.")
    for row in found.rows:
        if row.problem is not None:
            lines.append(f"{row.scheme}: not measured. {row.problem}")
        elif row.kept_layers:
            first, more = row.kept_layers[0], len(row.kept_layers) - 1
            lines.append(f"{row.scheme} keeps {first}" + (f" and {more} more" if more else ""))
    return lines


def _mib(num_bytes: int) -> str:
    mib = num_bytes / 1024**2
    return f"{mib:.2f}" if mib < 10 else f"{mib:.0f}"


def _percent(share: float) -> str:
    return f"{share:+.1%}" if abs(share) < 10 else f"{share:+.1e}"


def _nats(nats: float) -> str:
    return f"{nats:.5f}" if nats < 1 else f"{nats:.3f}"
