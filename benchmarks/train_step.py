"""One training step, ours and mlx-lm's, on the same random int4 model and the same examples.

    python benchmarks/train_step.py --repetitions 5

Each measurement is a process of its own; the two take turns. Both train rank-8 adapters on every attention
projection in float32 with Adam, mlx-lm with its own loss, batches and compiled step (mlx_lm.tuner), we with
the step that `mlx-qlora train` runs. Printed are medians and their ratios: real tokens per second (padding is
not counted), MLX's peak above what was resident before the step (act), and the peak of the process (Linux:
its resident set). On Linux our side uses a system BLAS when there is one, as `mlx-qlora train` does; with
MLX_QLORA_BLAS=off in the environment it does not. mlx-lm's loss also covers one padding token per padded
row; that changes neither figure.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


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


CASES = {
    "plain": Case(vocabulary=8_000, batch_size=4, length=256),
    "large-vocabulary": Case(vocabulary=128_000, batch_size=4, length=512),
    "half-masked": Case(vocabulary=32_000, batch_size=4, length=256, prompt_share=0.5),
    "long": Case(vocabulary=32_000, batch_size=1, length=2048, layers=4),
    "alpaca-lengths": Case(vocabulary=8_000, batch_size=4, length=512, alpaca_like=True),
}


def examples(case: Case, count: int) -> list[np.ndarray]:
    """Token rows, the same for both sides."""
    rng = np.random.default_rng(0)
    if case.alpaca_like:
        lengths = np.clip(np.exp(rng.normal(np.log(60), 0.75, count)).astype(int) + 1, 8, case.length)
    else:
        lengths = np.full(count, case.length)
    return [rng.integers(1, case.vocabulary, n).astype(np.int32) for n in lengths]


def model_for(case: Case) -> Any:
    """A random Llama in int4, group 64, computing in float32."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.models import llama

    mx.random.seed(0)
    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=case.hidden,
        num_hidden_layers=case.layers,
        intermediate_size=case.hidden * 11 // 4 // 64 * 64,
        num_attention_heads=case.hidden // 64,
        num_key_value_heads=case.hidden // 64,
        rms_norm_eps=1e-5,
        vocab_size=case.vocabulary,
        tie_word_embeddings=False,
    )
    model = llama.Model(args)
    nn.quantize(model, 64, 4)
    mx.eval(model.parameters())
    return model


def our_steps(case: Case, steps: int) -> list[tuple[float, int, int]]:
    """(seconds, tokens, act bytes) of each of our steps."""
    import mlx_qlora  # noqa: F401, I001  # before MLX, as everywhere: it may load a BLAS
    import mlx.core as mx

    from mlx_qlora.config import DataConfig, LoraConfig, TrainingConfig
    from mlx_qlora.dataset import Batches
    from mlx_qlora.dataset.records import Example
    from mlx_qlora.lora.attach import attach
    from mlx_qlora.objective.loss import objective_for
    from mlx_qlora.quantization.dense import dense_products
    from mlx_qlora.training.optimizer import build_optimizer
    from mlx_qlora.training.step import TrainStep

    model = model_for(case)
    attach(model, LoraConfig(target_modules=("q_proj", "k_proj", "v_proj", "o_proj")), seed=0)
    config = TrainingConfig(batch_size=case.batch_size, optimizer="adam")
    rows = [
        Example(row, np.arange(len(row)) > len(row) * case.prompt_share, "made")
        for row in examples(case, steps * case.batch_size)
    ]
    objective = objective_for(model.train())
    layout = objective.layout(DataConfig(max_seq_length=case.length))
    batches = Batches(rows, case.batch_size, 1, 0, layout)
    step = TrainStep(objective, build_optimizer(config), config)
    results = []
    for number in range(steps):
        micro_batches = batches.step(number)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        started = time.perf_counter()
        with dense_products(model):
            outcome = step(micro_batches, number + 1, 1e-4)
        seconds = time.perf_counter() - started
        results.append((seconds, outcome.tokens, mx.get_peak_memory() - before))
    return results


def mlx_lm_steps(case: Case, steps: int) -> list[tuple[float, int, int]]:
    """(seconds, tokens, act bytes) of each of mlx-lm's steps, compiled as its trainer does."""
    from functools import partial

    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx_lm.tuner.trainer import default_loss
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = model_for(case)
    model.freeze()
    keys = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    linear_to_lora_layers(model, case.layers, {"rank": 8, "scale": 2.0, "dropout": 0.0, "keys": keys})
    model.train()
    optimizer = optim.Adam(1e-4)
    nll_and_grad = nn.value_and_grad(model, default_loss)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch: mx.array, lengths: mx.array) -> mx.array:
        (loss, _), grad = nll_and_grad(model, batch, lengths)
        optimizer.update(model, grad)
        return loss

    rows, results = examples(case, steps * case.batch_size), []
    order = np.random.default_rng([0, 0]).permutation(len(rows))  # ours
    for number in range(steps):
        chosen = [rows[i] for i in order[number * case.batch_size : (number + 1) * case.batch_size]]
        # As mlx_lm.tuner.trainer.iterate_batches lays a batch out.
        width = min(1 + 32 * -(-max(map(len, chosen)) // 32), case.length)
        padded = np.zeros((len(chosen), width), np.int32)
        for index, row in enumerate(chosen):
            padded[index, : len(row)] = row
        lengths = [(int(len(row) * case.prompt_share), len(row)) for row in chosen]
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        started = time.perf_counter()
        loss = step(mx.array(padded), mx.array(lengths))
        mx.eval(state, loss)
        seconds = time.perf_counter() - started
        results.append((seconds, sum(map(len, chosen)), mx.get_peak_memory() - before))
    return results


def worker(side: str, case: Case, steps: int) -> None:
    """Measure one side in this process and print it; the first step, which warms up, is left out."""
    results = (our_steps if side == "ours" else mlx_lm_steps)(case, steps + 1)[1:]
    measured = {
        "tokens_per_second": sum(tokens for _, tokens, _ in results) / sum(s for s, _, _ in results),
        "act_bytes": max(act for _, _, act in results),
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(measured))


def measure(name: str, repetitions: int, steps: int) -> dict[str, Any]:
    """Medians of both sides and their ratios."""
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "mlx_lm": []}
    for repetition in range(repetitions):
        for side in ("ours", "mlx_lm") if repetition % 2 == 0 else ("mlx_lm", "ours"):
            command = [sys.executable, __file__, "--worker", side, "--case", name, "--steps", str(steps)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name} {side}: {runs[side][-1]}", file=sys.stderr, flush=True)
    medians = {
        side: {key: statistics.median(run[key] for run in many) for key in many[0]}
        for side, many in runs.items()
    }
    ratios = {key: medians["ours"][key] / medians["mlx_lm"][key] for key in medians["ours"]}
    return {"case": asdict(CASES[name]), **medians, "ratio": ratios}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="measured steps per process")
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    parser.add_argument("--worker", choices=["ours", "mlx_lm"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, CASES[options.case], options.steps)
        return
    names = list(CASES) if options.case == "all" else [options.case]
    results = {name: measure(name, options.repetitions, options.steps) for name in names}
    if options.json:
        print(json.dumps(results))
        return
    print(f"{'case':<18}{'tokens/s':>22}{'act MiB':>24}{'process MiB':>24}")
    for name, result in results.items():
        cells = []
        for key, unit in (("tokens_per_second", 1), ("act_bytes", 2**20), ("process_peak_bytes", 2**20)):
            ours, theirs = result["ours"][key] / unit, result["mlx_lm"][key] / unit
            cells.append(f"{ours:.0f} / {theirs:.0f}  ×{result['ratio'][key]:.2f}")
        print(f"{name:<18}{cells[0]:>22}{cells[1]:>24}{cells[2]:>24}")


if __name__ == "__main__":
    main()
