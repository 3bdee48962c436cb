"""``mlx-qlora data``: check, convert, split."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_qlora.commands.output import Json, on_bytes, print_json, say
from mlx_qlora.config import build_config, parse_assignment, read_config
from mlx_qlora.errors import ConfigError, DataError, listed
from mlx_qlora.presets import preset as preset_tree

data = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Rows to train on: look through them, bring them into form, split them.\n\n"
    "Example: mlx-qlora data check data/farense",
)

SkipBadRows = Annotated[bool, typer.Option("--skip-bad-rows", help="Go on without unusable rows.")]
Columns = Annotated[
    list[str] | None, typer.Option("--columns", help="The data's own names: --columns question=pergunta")
]


@data.command()
def check(
    place: Annotated[
        str, typer.Argument(metavar="DATA", help="Folder, .jsonl or .csv file, or hub data set.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Count this model's tokens, and render rows as training does.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with the run's configuration.")] = None,
    preset: Annotated[str | None, typer.Option(help="mac-8gb, mac-16gb or mac-32gb.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="One key: --set data.max_seq_length=256")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Take warnings for problems.")] = False,
    as_json: Json = False,
) -> None:
    """Look through a data set before it is trained on, and say what to do about what is found.

    Example: mlx-qlora data check data/farense --model mistralai/Mistral-7B-v0.1 --preset mac-8gb

    Schema, duplicates, leaks between the files, lengths, empty and very long answers, control tokens, wrong
    encodings, languages, and what an epoch takes. Without --model lengths are in characters, and tokens are
    estimated. Exits with 0 if a run would start on it, with 2 and the problems otherwise.
    """
    from mlx_qlora.dataset.check_report import check_data

    trees: list[dict[str, Any]] = [preset_tree(preset)] if preset else []
    trees += [read_config(config)] if config else []
    trees += [{"data": {"path": place}}]
    trees += [parse_assignment(assignment) for assignment in assignments or []]
    run = build_config(*trees, where="command line")
    tokenizer = _tokenizer(model, revision) if model is not None else None
    found = check_data(
        run.data, run.training, tokenizer, model=model, on_progress=on_bytes("Reading the data")
    )
    refused = [f for f in found.findings if f.severity == "problem" or (strict and f.severity == "warning")]
    if as_json:
        print_json({**found.as_dict(), "usable": not refused})
    else:
        _show(found)
    if refused:
        told = [f"{f.split or 'data'}: {f.what}" for f in refused]
        raise DataError(f"{len(refused)} thing(s) to mend first:\n{listed(told)}", where=place)


@data.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help=".csv, .tsv, .json, .jsonl, .txt or .md file.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The new .jsonl file.")],
    form: Annotated[
        str | None,
        typer.Option(
            "--from", help="table, squad, alpaca, sharegpt, openai, qa-text or text; found out if none."
        ),
    ] = None,
    columns: Columns = None,
    context: Annotated[
        bool, typer.Option("--context", help="Put a row's context before its question.")
    ] = False,
    encoding: Annotated[str, typer.Option(help="Of the file: utf-8, cp1252, utf-16.")] = "utf-8",
    chunk_characters: Annotated[
        int, typer.Option(help="Plain text: characters in a row, at most.", min=50)
    ] = 2000,
    skip_bad_rows: SkipBadRows = False,
    as_json: Json = False,
) -> None:
    """Make chat rows, one JSON object a line, of the forms that data comes in.

    Example: mlx-qlora data convert perguntas.csv train.jsonl --columns question=pergunta,answer=resposta

    Tables (CSV, TSV, JSON), SQuAD, Alpaca, ShareGPT, OpenAI chats, and text with "P:" and "R:" or "Q:" and
    "A:" become conversations; other text and Markdown become rows of text. Nothing is ever overwritten.
    """
    from mlx_qlora.dataset.convert import Conversion, convert_file

    result = convert_file(
        source,
        output,
        Conversion(
            form=form,
            columns=_columns(columns),
            with_context=context,
            encoding=encoding,
            chunk_characters=chunk_characters,
            skip_bad_rows=skip_bad_rows,
        ),
        on_progress=on_bytes("Converting"),
    )
    if as_json:
        print_json(result.as_dict())
        return
    say(f"found: {result.found}")
    for note in result.notes:
        say(note)
    if result.bad:
        say(f"left out, {len(result.bad)} that cannot be used:\n{listed(result.bad)}")
    say(f"{result.rows} rows in {output}")
    say(f"Run: mlx-qlora data check {output}")


@data.command()
def split(
    source: Annotated[str, typer.Argument(metavar="DATA", help="Folder, .jsonl or .csv file, hub data set.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the three files.")],
    valid: Annotated[float, typer.Option(help="Share for valid.jsonl.", min=0, max=0.9)] = 0.1,
    test: Annotated[float, typer.Option(help="Share for test.jsonl.", min=0, max=0.9)] = 0.1,
    seed: Annotated[int, typer.Option(help="Another seed is another split.", min=0)] = 0,
    columns: Columns = None,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Keep one of rows that say the same.")
    ] = False,
    skip_bad_rows: SkipBadRows = False,
    as_json: Json = False,
) -> None:
    """Write train.jsonl, valid.jsonl and test.jsonl; a row's place is decided by its question and the seed.

    Example: mlx-qlora data split perguntas.jsonl data/perguntas --valid 0.1 --test 0.1 --seed 0

    Rows with one question stay together, so none is both learned and asked. When rows are added later, those
    that were there stay where they were.
    """
    from mlx_qlora.dataset.partition import Shares, split_data

    result = split_data(
        source,
        output,
        Shares(valid=valid, test=test, seed=seed),
        columns=_columns(columns),
        drop_duplicates=drop_duplicates,
        skip_bad_rows=skip_bad_rows,
        on_progress=on_bytes("Splitting"),
    )
    if as_json:
        print_json(result.as_dict())
        return
    for note in result.notes:
        say(note)
    for name, count in result.rows.items():
        say(f"{name}: {count} rows ({count / max(1, sum(result.rows.values())):.1%})")
    say(f"Run: mlx-qlora train --model M --data {output} --adapter-path adapters/NAME")


def _columns(pairs: list[str] | None) -> dict[str, str]:
    columns = {}
    for pair in [part for text in pairs or [] for part in text.split(",")]:
        name, separator, own = pair.partition("=")
        if not separator or not name.strip() or not own.strip():
            raise ConfigError(
                f"--columns takes OURS=THEIRS, not {pair!r}.",
                run="mlx-qlora data convert IN OUT --columns question=pergunta,answer=resposta",
            )
        columns[name.strip()] = own.strip()
    return columns


def _tokenizer(model: str, revision: str | None) -> Any:
    from mlx_lm.utils import load_tokenizer

    from mlx_qlora.errors import ModelError
    from mlx_qlora.weights.source import resolve_model

    folder = Path(model).expanduser()
    if not (folder / "tokenizer.json").is_file():
        folder = resolve_model(model, revision, needs_weights=False).folder
    if not any(folder.glob("tokenizer*")):
        raise ModelError("The model's folder holds no tokenizer.", where=str(folder))
    return load_tokenizer(folder)


def _show(found: Any) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    is_soft = not console.is_terminal  # a pipe gets each sentence as one line
    console.print(found.path, style="bold", soft_wrap=True)
    _show_splits(console, found)
    if found.language is not None:
        console.print(f"Language of the rows: {found.language}")
    if (epoch := found.epoch) is not None:
        about = "about " if epoch.is_estimate else ""
        console.print(
            f"An epoch: {about}{epoch.tokens} tokens, {epoch.updates} updates of {epoch.batch_size} x "
            f"{epoch.gradient_accumulation} rows; {epoch.num_epochs} epochs: {about}"
            f"{epoch.num_epochs * epoch.tokens} tokens, {epoch.num_epochs * epoch.updates} updates",
            soft_wrap=is_soft,
        )
    if found.unit == "characters":
        console.print(
            "Lengths are in characters, and tokens an estimate: 4.2 characters to one in English, else 3.2. "
            "With --model M they are counted.",
            soft_wrap=is_soft,
        )
    for finding in found.findings:
        _show_finding(console, finding, is_soft=is_soft)
    console.print()
    if not found.problems:
        console.print("It can be trained on.")


def _show_splits(console: Any, found: Any) -> None:
    from rich.table import Table

    heads = ("file", "rows", "schema", found.unit, "median", "90 %", "99 %", "longest")
    rows = [_cells(split, found.unit) for split in found.splits.values()]
    widths = [max(len(cells[number]) for cells in [heads, *rows]) for number in range(len(heads))]
    widths[0] = max(8, min(widths[0], console.width - sum(widths[1:]) - 2 * len(heads)))
    table = Table(box=None, pad_edge=False)
    for number, (head, width) in enumerate(zip(heads, widths, strict=True)):
        side: Any = "left" if number in (0, 2) else "right"
        table.add_column(head, justify=side, no_wrap=True, min_width=width, max_width=width)
    for cells in rows:
        table.add_row(*cells)
    console.print(table)


def _cells(split: Any, unit: str) -> tuple[str, ...]:
    total = split.characters if unit == "characters" else split.tokens or 0
    lengths = (str(split.lengths.get(key, "")) for key in ("p50", "p90", "p99", "max"))
    return (split.file, str(split.rows), split.schema or "?", str(total), *lengths)


def _show_finding(console: Any, finding: Any, *, is_soft: bool) -> None:
    from rich.text import Text

    style = {"problem": "bold red", "warning": "yellow", "note": "dim"}[finding.severity]
    where = f"{finding.split}: " if finding.split else ""
    console.print()
    console.print(Text.assemble((finding.severity, style), f": {where}{finding.what}"), soft_wrap=is_soft)
    if any(": " in place for place in finding.first):
        for place in finding.first:
            console.print(f"    {place}", soft_wrap=True)
    elif finding.first:
        file = finding.first[0].partition(":")[0]
        lines = ", ".join(finding.first).replace(f"{file}:", "")
        more = ", …" if (finding.count or 0) > len(finding.first) else ""
        console.print(f"    {file}: {lines}{more}", soft_wrap=True)
    if finding.run:
        console.print(f"  Run: {finding.run}", soft_wrap=True)
