"""One training step, ours and mlx-lm's, on the same random int4 model and the same examples.

    python benchmarks/train_step.py --repetitions 5
    python benchmarks/train_step.py --case long --side mlx_lm --side ours+blas
    python benchmarks/train_step.py --unsloth-python ~/unsloth/bin/python

Each measurement is a process of its own; the sides take turns. All train rank-8 adapters on every attention
projection in float32 with Adam: mlx-lm with its own loss, batches and compiled step (mlx_lm.tuner), we with
the step that `mlx-qlora train` runs, in the memory limits that it sets, Unsloth with its MLX trainer and that
one's defaults, where an interpreter that has `unsloth_zoo` is named. A side's name says its settings: `+blas`
has a system BLAS loaded before MLX, which only `mlx-qlora` does by itself; `+checkpointing` computes layers
again in the backward pass.

Printed are medians and their ratios to mlx-lm's: real tokens per second (padding is not counted), MLX's peak
above what was resident before the step (act), the peak of the whole process (its resident set; the model is
read from a file), and the mean loss of the first step in nats. That loss must be the same everywhere but for
padded rows, where mlx-lm also trains on one padding token; that changes neither speed nor memory. The first
step of a process warms up and is not counted, except where it takes a minute (`Case.warm_up`); Unsloth's
first step has its trainer's preparation in it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from pairing import Figures, compared, environment, finished, in_turn, print_table

from mlx_qlora.blas import blas_is_fast

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK, ALPHA, LEARNING_RATE = 8, 16.0, 1e-4
BASELINE = "mlx_lm"
LIBRARIES, SETTINGS = ("mlx_lm", "ours", "unsloth"), ("blas", "checkpointing")
LOSS_TOLERANCE = 1e-3
"""Of the sum of logits in another order, relative; a wrong mask or model is far above it."""

Rows = list[np.ndarray]
"""The tokens of one batch's examples, int32."""
Step = tuple[float, int, int, float]
"""Seconds, real tokens, bytes above what was resident, mean loss."""


@dataclass(frozen=True)
class Case:
    """A model's shape and a stream of examples."""

    vocabulary: int
    batch_size: int
    length: int
    hidden: int = 256
    layers: int = 2
    prompt_share: float = 0.0
    """Share of each example that is not trained on."""
    alpaca_like: bool = False
    """Log-normal lengths with a median of 60 tokens instead of all `length`."""
    steps: int = 4
    """Measured in each process, after those that warm up."""
    warm_up: int = 1


CASES = {
    "tiny": Case(vocabulary=256, batch_size=2, length=64, hidden=64, layers=1, prompt_share=0.5, steps=1),
    "plain": Case(vocabulary=8_000, batch_size=4, length=256),
    "wide": Case(vocabulary=32_000, batch_size=4, length=257, hidden=512, layers=4, steps=1),
    "half-masked": Case(vocabulary=32_000, batch_size=4, length=256, prompt_share=0.5),
    "mostly-masked": Case(vocabulary=32_000, batch_size=4, length=256, prompt_share=0.75),
    "alpaca-lengths": Case(vocabulary=8_000, batch_size=4, length=512, alpaca_like=True),
    "long": Case(vocabulary=32_000, batch_size=1, length=2048, layers=4, steps=1),
    "large-vocabulary": Case(vocabulary=128_000, batch_size=4, length=512, steps=1, warm_up=0),
    "huge-vocabulary": Case(vocabulary=152_000, batch_size=4, length=1024, steps=1, warm_up=0),
}


def main(
    case: Annotated[list[str] | None, typer.Option(help="Cases to run; all but tiny when not given.")] = None,
    side: Annotated[
        list[str] | None, typer.Option(help="mlx_lm, ours or unsloth, with +blas and +checkpointing.")
    ] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Processes of each side.")] = 5,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Measured steps of a process; the case's own when not given.")
    ] = None,
    unsloth_python: Annotated[
        Path | None, typer.Option(help="An interpreter that can import unsloth_zoo.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Measure, check that all sides compute the same loss, print."""
    sides = _sides(side, has_unsloth=unsloth_python is not None)
    if unknown := set(case or ()) - CASES.keys():
        raise SystemExit(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    results = {}
    for name in case or [name for name in CASES if name != "tiny"]:
        with tempfile.TemporaryDirectory(prefix="train_step_") as folder:
            finished([sys.executable, __file__, "model", name, folder])
            measure = partial(_cost, name, steps or CASES[name].steps, folder, unsloth_python)
            figures = in_turn(sides, repetitions, measure, name)
        results[name] = {"case": asdict(CASES[name]), "sides": compared(figures, sides[0])}
        if not as_json:
            _print(name, results[name])
    if as_json:
        print(json.dumps(results))
    if problems := [problem for name, result in results.items() for problem in _loss_problems(name, result)]:
        raise SystemExit("\n".join(problems))


def _sides(wanted: list[str] | None, *, has_unsloth: bool) -> list[str]:
    """The sides to measure, the baseline first."""
    if not wanted:
        wanted = [BASELINE, "ours"]
        if blas_is_fast():
            wanted.append("ours+blas")
        if has_unsloth:
            wanted += ["unsloth", "unsloth+checkpointing"]
        else:
            print("Unsloth is left out: no --unsloth-python.", file=sys.stderr)
    for side in wanted:
        library, *settings = side.split("+")
        if library not in LIBRARIES or not set(settings) <= set(SETTINGS):
            names = f"{', '.join(LIBRARIES)}, with +{' and +'.join(SETTINGS)}"
            raise SystemExit(f"no side {side!r}; there are {names}")
        if library == "unsloth" and not has_unsloth:
            raise SystemExit("Unsloth runs in an interpreter of its own: --unsloth-python PATH")
        if "blas" in settings and not blas_is_fast():
            raise SystemExit("There is no BLAS to load. Run: sudo apt-get install libopenblas0-pthread")
    return sorted(wanted, key=lambda side: side != BASELINE)


def _cost(name: str, steps: int, folder: str, unsloth_python: Path | None, side: str) -> Figures:
    """One side's figures, from a process of its own."""
    python = str(unsloth_python) if side.startswith("unsloth") else sys.executable
    run = finished(
        [python, __file__, "worker", side, name, str(steps), folder],
        environment(has_blas="blas" in side.split("+"))
        | {"PYTHONPATH": str(Path(__file__).parents[1]), "UNSLOTH_ZOO_DISABLE_GPU_INIT": "1"},
    )
    return {**json.loads(run.output.splitlines()[-1]), "process_peak_bytes": run.peak_rss_bytes}


def _loss_problems(name: str, result: dict[str, Any]) -> list[str]:
    """Sides that did not compute what the others did."""
    losses = {side: values["median"]["loss_nats"] for side, values in result["sides"].items()}
    if CASES[name].alpaca_like:  # padded rows, where mlx-lm has another loss
        losses = {side: loss for side, loss in losses.items() if side.startswith("ours")}
    if not losses or max(losses.values()) - min(losses.values()) <= LOSS_TOLERANCE * max(losses.values()):
        return []
    return [f"{name}: the sides' losses differ: {losses}"]


def _print(name: str, result: dict[str, Any]) -> None:
    case = result["case"]
    title = (
        f"{name}: V = {case['vocabulary']:,}, {case['batch_size']} × {case['length']}, "
        f"{case['layers']} layers of {case['hidden']}"
    )
    columns = {
        "tokens_per_second": ("tokens/s", 1.0, 0),
        "act_bytes": ("act (MiB)", 2.0**20, 0),
        "process_peak_bytes": ("process (MiB)", 2.0**20, 0),
        "loss_nats": ("loss", 1.0, 4),
    }
    print_table(title, result["sides"], columns)


def write_model(name: str, folder: str) -> None:
    """The case's model, read by every process that is measured."""
    from random_llama import write_random_llama

    case = CASES[name]
    write_random_llama(Path(folder), vocabulary=case.vocabulary, hidden=case.hidden, layers=case.layers)


def worker(side: str, name: str, num_steps: int, folder: str) -> None:
    """Measure one side in this process and print it."""
    from mlx_lm.utils import load_model

    case, (library, *settings) = CASES[name], side.split("+")
    model, _ = load_model(Path(folder))
    run = {"ours": our_steps, "mlx_lm": mlx_lm_steps, "unsloth": unsloth_steps}[library]
    count = case.warm_up + num_steps
    done = list(run(case, model, examples(case, count), checkpointing="checkpointing" in settings))
    measured = done[case.warm_up :]
    figures = {
        "tokens_per_second": sum(tokens for _, tokens, _, _ in measured) / sum(s for s, _, _, _ in measured),
        "seconds_per_step": sum(s for s, _, _, _ in measured) / len(measured),
        "act_bytes": max(act for _, _, act, _ in measured),
        "loss_nats": done[0][3],
    }
    print(json.dumps(figures))


def examples(case: Case, num_steps: int) -> list[Rows]:
    """The token rows of each step's batch, the same for all sides."""
    rng = np.random.default_rng(0)
    lengths = np.full((num_steps, case.batch_size), case.length)
    if case.alpaca_like:
        drawn = np.exp(rng.normal(np.log(60), 0.75, lengths.shape)).astype(int) + 1
        lengths = np.clip(drawn, 8, case.length)
    return [[rng.integers(3, case.vocabulary, n).astype(np.int32) for n in row] for row in lengths]


def prompt_length(case: Case, row: np.ndarray) -> int:
    """How many of a row's first tokens are not predicted; the first never is."""
    return max(1, int(len(row) * case.prompt_share))


def measured_step(run: Callable[[], float], num_tokens: int) -> Step:
    """Run one step, which gives its mean loss, and measure it."""
    import mlx.core as mx

    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    started = time.perf_counter()
    loss = run()
    return time.perf_counter() - started, num_tokens, mx.get_peak_memory() - before, loss


def our_steps(case: Case, model: Any, batches: list[Rows], *, checkpointing: bool) -> Iterator[Step]:
    """As mlx_qlora.training.run trains."""
    from mlx_qlora.config import DataConfig, LoraConfig, TrainingConfig
    from mlx_qlora.dataset.batches import Batch, collated
    from mlx_qlora.dataset.records import Example
    from mlx_qlora.lora.attach import attach
    from mlx_qlora.memory.limits import memory_limits
    from mlx_qlora.memory.monitor import device_limit_bytes
    from mlx_qlora.objective.loss import objective_for
    from mlx_qlora.quantization.dense import dense_products
    from mlx_qlora.training.optimizer import build_optimizer
    from mlx_qlora.training.recompute import recomputed
    from mlx_qlora.training.step import TrainStep

    attach(model, LoraConfig(rank=RANK, alpha=ALPHA, target_modules=PROJECTIONS), seed=0)
    config = TrainingConfig(batch_size=case.batch_size, optimizer="adam")
    with (
        memory_limits(device_limit_bytes()),
        recomputed(list(model.layers), enabled=checkpointing),
        dense_products(model),
    ):
        objective = objective_for(model.train())
        layout = objective.layout(DataConfig(max_seq_length=case.length))
        step = TrainStep(objective, build_optimizer(config), config)

        def run(batch: Batch, number: int) -> float:
            outcome = step([batch], number, LEARNING_RATE)
            return outcome.nll / outcome.target_tokens

        for number, rows in enumerate(batches, start=1):
            made = [Example(row, np.arange(len(row)) >= prompt_length(case, row), "made") for row in rows]
            batch = collated([[example] for example in made], layout)
            yield measured_step(partial(run, batch, number), batch.tokens)


def mlx_lm_steps(case: Case, model: Any, batches: list[Rows], *, checkpointing: bool) -> Iterator[Step]:
    """As mlx_lm.tuner.trainer.train compiles and runs it."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx_lm.tuner.trainer import default_loss, grad_checkpoint

    _attach_by_mlx_lm(model, case)
    if checkpointing:
        grad_checkpoint(model.layers[0])
    optimizer = optim.Adam(LEARNING_RATE)
    nll_and_grad = nn.value_and_grad(model, default_loss)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch: mx.array, lengths: mx.array) -> mx.array:
        (loss, _), grad = nll_and_grad(model, batch, lengths)
        optimizer.update(model, grad)
        return loss

    def run(tokens: np.ndarray, lengths: list[tuple[int, int]]) -> float:
        loss = step(mx.array(tokens), mx.array(lengths))
        mx.eval(state, loss)
        return float(loss.item())

    for rows in batches:
        # Its tokens count from 1 in the mask, and a row of all `length` has one label less than tokens.
        lengths = [(prompt_length(case, row), len(row)) for row in rows]
        yield measured_step(partial(run, padded(case, rows), lengths), sum(map(len, rows)))


def unsloth_steps(case: Case, model: Any, batches: list[Rows], *, checkpointing: bool) -> Iterator[Step]:
    """Unsloth's MLX trainer, its own defaults but for what all sides share; measured only."""
    import mlx.core as mx
    from unsloth_zoo.mlx.trainer import MLXTrainer, MLXTrainingConfig

    _attach_by_mlx_lm(model, case)
    made = []
    for rows in batches:
        tokens = padded(case, rows)
        labels = np.full_like(tokens, -100)
        for index, row in enumerate(rows):
            labels[index, prompt_length(case, row) : len(row)] = row[prompt_length(case, row) :]
        lengths = np.array([(0, len(row)) for row in rows])
        made.append((mx.array(tokens), mx.array(lengths), mx.array(labels)))
    trainer = MLXTrainer(
        model,
        None,
        [],
        args=MLXTrainingConfig(
            per_device_train_batch_size=case.batch_size,
            gradient_accumulation_steps=1,
            max_steps=len(batches),
            warmup_steps=0,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            optim="adam",
            weight_decay=0.0,
            max_seq_length=case.length,
            gradient_checkpointing=checkpointing,
            output_dir=tempfile.mkdtemp(prefix="unsloth_"),
        ),
    )
    trainer._batches = made
    trainer.save_model = lambda *_: None  # there is no tokenizer to save, and saving is not measured
    done: list[Step] = []

    def after_step(_step: int, _total: int, loss: float, *_others: object) -> None:
        nonlocal before, started
        act = mx.get_peak_memory() - before
        done.append((time.perf_counter() - started, sum(map(len, batches[len(done)])), act, loss))
        mx.clear_cache()
        mx.reset_peak_memory()
        before, started = mx.get_active_memory(), time.perf_counter()

    trainer.add_step_callback(after_step)
    mx.reset_peak_memory()
    before, started = mx.get_active_memory(), time.perf_counter()
    with redirect_stdout(sys.stderr):
        trainer.train()
    yield from done


def padded(case: Case, rows: Rows) -> np.ndarray:
    """A batch as mlx_lm.tuner.trainer.iterate_batches lays it out, (B, T)."""
    width = min(1 + 32 * -(-max(map(len, rows)) // 32), case.length)
    tokens = np.zeros((len(rows), width), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return tokens


def _attach_by_mlx_lm(model: Any, case: Case) -> None:
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model.freeze()
    keys = [f"self_attn.{name}" for name in PROJECTIONS]
    settings = {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, case.layers, settings)
    model.train()


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
    elif sys.argv[1:2] == ["model"]:
        write_model(sys.argv[2], sys.argv[3])
    else:
        typer.run(main)
