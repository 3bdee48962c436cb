"""A whole training run from the command line, ours and mlx-lm's, on the same model and rows.

    python benchmarks/train_run.py --repetitions 5

`mlx-qlora train` and `mlx_lm lora` take turns, each in a process of its own: imports, loading, one validation
before and one after, and as many updates of one batch as use every row once. The rows are the first of GSM8K
where ../shared/material has it, else the demo's; the model is a random int4 Llama with a real tokenizer, so
its loss says only that both learn the same. Both train rank-8 adapters on every attention projection in
float32 with Adam at a constant rate, without clipping, on the answers only.

What differs: which rows share a batch and in which order (mlx-lm's batches are consecutive rows of the file
in a random order, ours are drawn one by one); mlx-lm's losses cover one padding token per padded row; ours
also makes a checkpoint with the optimizer's state, a metrics file and a report, and checks the model's files.

Printed are medians and their ratios to mlx-lm's: wall seconds of the whole process, the rows' tokens over
those seconds, the peak of the process (its resident set), and the validation loss after the last update, in
nats, by each one's own report. `+blas` is ours with a system BLAS, as installed; mlx-lm loads none.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pairing import Figures, compared, environment, finished, in_turn, print_table

from mlx_qlora.blas import blas_is_fast

REPOSITORY = Path(__file__).parents[1]
GSM8K = REPOSITORY.parent / "shared" / "material" / "datasets" / "gsm8k"
CLUB = REPOSITORY / "data" / "demo" / "club"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK, ALPHA, LEARNING_RATE = 8, 16.0, 1e-3
LOSS_TOLERANCE = 0.02
"""Relative: batches are not the same."""


def main(
    repetitions: Annotated[int, typer.Option(min=1, help="Runs of each side.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer updates of a run.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of an update.")] = 4,
    valid_batches: Annotated[int, typer.Option(min=1, help="Batches of a validation.")] = 2,
    hidden: Annotated[int, typer.Option(min=64, help="Hidden size, a multiple of 64.")] = 256,
    layers: Annotated[int, typer.Option(min=1, help="Layers.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Measure both, check that both learned the same, print."""
    sides = ["mlx_lm", "ours", *(["ours+blas"] if blas_is_fast() else [])]
    with tempfile.TemporaryDirectory(prefix="train_run_") as temporary:
        folder = Path(temporary)
        rows = write_rows(folder / "data", num_train=steps * batch_size, num_valid=valid_batches * batch_size)
        make_model = [sys.executable, str(Path(__file__).with_name("random_llama.py"))]
        finished([*make_model, str(folder / "model"), str(hidden), str(layers)])
        write_settings(folder, steps, batch_size)
        figures = in_turn(sides, repetitions, partial(run, folder, count()))
    tokens = figures["ours"][0]["tokens"]
    for measured in [one for side in sides for one in figures[side]]:
        measured["tokens_per_second"] = tokens / measured["seconds"]
    result = {"rows": rows, "steps": steps, "batch_size": batch_size, "hidden": hidden, "layers": layers,
              "tokens": tokens, "sides": compared(figures, sides[0])}  # fmt: skip
    if as_json:
        print(json.dumps(result))
    else:
        show(result)
    losses = [values["median"]["val_loss_nats"] for values in result["sides"].values()]
    if max(losses) - min(losses) > LOSS_TOLERANCE * max(losses):
        raise SystemExit(f"the sides did not learn the same: {losses}")


def write_rows(folder: Path, *, num_train: int, num_valid: int) -> str:
    """Conversations that both read as they are; where they are from."""
    folder.mkdir(parents=True)
    has_gsm8k = GSM8K.is_dir()
    train, valid = (GSM8K / "train.jsonl", GSM8K / "test.jsonl") if has_gsm8k else (
        CLUB / "train.jsonl", CLUB / "valid.jsonl"
    )  # fmt: skip
    for name, source, limit in (("train", train, num_train), ("valid", valid, num_valid)):
        with source.open(encoding="utf-8") as file:
            found = [conversation(json.loads(line)) for line in islice(file, limit)]
        if len(found) < limit:
            raise SystemExit(f"{source} has {len(found)} rows, not {limit}: fewer --steps or --batch-size")
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return "GSM8K" if has_gsm8k else "the demo's"


def conversation(row: dict[str, Any]) -> dict[str, Any]:
    """One row as `messages`."""
    if "messages" in row:
        return {"messages": row["messages"]}
    turns = (("user", row["question"]), ("assistant", row["answer"]))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write_settings(folder: Path, steps: int, batch_size: int) -> None:
    """The same run in both vocabularies."""
    ours = {
        "model": {"path": str(folder / "model")},
        "lora": {"rank": RANK, "alpha": ALPHA, "target_modules": list(PROJECTIONS)},
        "data": {"path": str(folder / "data"), "max_seq_length": 512},
        "training": {
            "max_steps": steps,
            "batch_size": batch_size,
            "gradient_accumulation": 1,
            "learning_rate": LEARNING_RATE,
            "lr_schedule": "constant",
            "warmup_steps": 0,
            "optimizer": "adam",
            "max_grad_norm": None,
            "steps_per_validation": steps,
            "steps_per_checkpoint": steps,
        },
    }
    theirs = {
        "model": str(folder / "model"),
        "train": True,
        "data": str(folder / "data"),
        "mask_prompt": True,
        "max_seq_length": 512,
        "num_layers": -1,
        "batch_size": batch_size,
        "iters": steps,
        "learning_rate": LEARNING_RATE,
        "optimizer": "adam",
        "val_batches": -1,
        "steps_per_report": steps,
        "steps_per_eval": steps,
        "save_every": steps,
        "lora_parameters": {
            "rank": RANK,
            "scale": ALPHA / RANK,
            "dropout": 0.0,
            "keys": [f"self_attn.{name}" for name in PROJECTIONS],
        },
    }
    for name, settings in (("ours", ours), ("mlx_lm", theirs)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def run(folder: Path, numbers: count[int], side: str) -> Figures:
    """One whole run of one side, into a folder of its own."""
    library = side.partition("+")[0]
    adapter = folder / f"adapter-{next(numbers)}"
    config = ["--config", str(folder / f"{library}.yaml"), "--adapter-path", str(adapter)]
    command = ["mlx_qlora", "train", "--json"] if library == "ours" else ["mlx_lm", "lora"]
    done = finished([sys.executable, "-m", *command, *config], environment(has_blas="+blas" in side))
    figures = {"seconds": done.seconds, "process_peak_bytes": float(done.peak_rss_bytes)}
    if library == "ours":
        events = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]
        losses = [event["loss_nats"] for event in events if event["event"] == "Validated"]
        return {**figures, "val_loss_nats": losses[-1], "tokens": json.loads(done.output)["tokens"]}
    shown = re.sub(r"\x1b\[[\d;]*m", "", done.output)  # it colours its output even off a terminal
    losses = [float(found) for found in re.findall(r"\bval +([\d.]+)", shown)]
    if not losses:
        raise SystemExit(f"mlx-lm reported no validation loss:\n{done.output[-2000:]}")
    return {**figures, "val_loss_nats": losses[-1]}


def show(result: dict[str, Any]) -> None:
    """For a person."""
    title = (
        f"{result['steps']} updates of {result['batch_size']} rows of {result['rows']} "
        f"({result['tokens']:,.0f} tokens), {result['layers']} layers of {result['hidden']}"
    )
    columns = {
        "seconds": ("seconds", 1.0, 1),
        "tokens_per_second": ("tokens/s", 1.0, 0),
        "process_peak_bytes": ("process (MiB)", 2.0**20, 0),
        "val_loss_nats": ("validation loss", 1.0, 3),
    }
    print_table(title, result["sides"], columns)


if __name__ == "__main__":
    typer.run(main)
