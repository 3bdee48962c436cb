"""One epoch with and without `training.cache_frozen_prefix`, adapters on the upper half of the layers.

    python benchmarks/frozen_prefix.py --repetitions 5

Each measurement is a process of its own; the two take turns. Both run the step that `mlx-qlora train` runs,
on the same random int4 model in float32 and the same examples, for two epochs. Compared is the second, on the
clock and in processor time, which other programs disturb less: before the first, the cache is made. Printed
are medians and their ratios, what making takes, the cache's bytes on disk, and the second epoch's mean loss:
hidden states are kept in bfloat16. The vocabulary is small so that the head's share of the work is a
7B model's (3 %), not a small model's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pairing import Figures, compared, finished, in_turn, print_table


@dataclass(frozen=True)
class Case:
    """A model's shape and one epoch of examples."""

    hidden: int = 384
    layers: int = 8
    vocabulary: int = 1_024
    batch_size: int = 4
    length: int = 257
    """Tokens of each example: one more than positions."""
    steps_per_epoch: int = 4
    alpaca_like: bool = False
    """Log-normal lengths with a median of 60 tokens instead of all `length`."""


CASES = {"even": Case(), "alpaca-lengths": Case(alpaca_like=True, steps_per_epoch=8)}
SIDES = ("plain", "cached")
COLUMNS = {
    "second_epoch_seconds": ("2nd epoch, s", 1.0, 2),
    "second_epoch_cpu_seconds": ("CPU, s", 1.0, 2),
    "making_seconds": ("making, s", 1.0, 2),
    "cache_bytes": ("cache MiB", 2.0**20, 1),
    "second_epoch_loss_nats": ("loss, nats", 1.0, 5),
}


def examples(case: Case) -> list[np.ndarray]:
    """Token rows, the same for both sides."""
    rng = np.random.default_rng(0)
    count = case.steps_per_epoch * case.batch_size
    if case.alpaca_like:
        lengths = np.clip(np.exp(rng.normal(np.log(60), 0.75, count)).astype(int) + 1, 8, case.length)
    else:
        lengths = np.full(count, case.length)
    return [rng.integers(1, case.vocabulary, n).astype(np.int32) for n in lengths]


def model_for(case: Case) -> Any:
    """A random Llama in int4, group 64, computing in float32; rank-8 adapters on its upper half."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.models import llama

    from mlx_qlora.config import LoraConfig
    from mlx_qlora.lora.attach import attach

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
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    attach(model, LoraConfig(target_modules=names, num_layers=case.layers // 2), seed=0)
    return model.train()


def measured(side: str, case: Case, folder: Path) -> Figures:
    """Seconds of the second epoch, and of what came before it."""
    import mlx_qlora  # noqa: F401, I001  # before MLX, as everywhere: it may load a BLAS
    import mlx.core as mx

    from mlx_qlora.config import DataConfig, TrainingConfig
    from mlx_qlora.dataset import Batches
    from mlx_qlora.dataset.records import Example
    from mlx_qlora.objective.loss import objective_for
    from mlx_qlora.objective.prefix import StoredPrefix, frozen_prefix
    from mlx_qlora.quantization.dense import dense_products
    from mlx_qlora.training.guard import StopRequest
    from mlx_qlora.training.optimizer import build_optimizer
    from mlx_qlora.training.prefix_cache import PrefixCache
    from mlx_qlora.training.prefix_run import PrefixRun
    from mlx_qlora.training.step import TrainStep

    model = model_for(case)
    rows = [Example(row, np.arange(len(row)) > 0, "made") for row in examples(case)]
    config = TrainingConfig(batch_size=case.batch_size, optimizer="adam")
    with dense_products(model):
        objective = objective_for(model)
        layout = objective.layout(DataConfig(max_seq_length=case.length))
        making_seconds, num_bytes = 0.0, 0
        if side == "cached":
            prefix = frozen_prefix(model)
            lengths = [len(row.tokens) - 1 for row in rows]
            started = time.perf_counter()
            cache = PrefixCache(folder, {}, lengths, case.hidden, mx.bfloat16)
            objective = replace(objective, prefix=StoredPrefix(prefix, mx.float32, cache.gathered))
            run = PrefixRun(objective, cache=cache, examples=rows)
            run.fill(on_bytes=None, stop=StopRequest(), run="")
            making_seconds, num_bytes = time.perf_counter() - started, cache.num_bytes
        step = TrainStep(objective, build_optimizer(config), config)
        batches = Batches(rows, case.batch_size, 1, 0, layout)
        epoch_seconds, cpu_seconds, losses = [], [], []
        for epoch in range(2):
            started, cpu_started = time.perf_counter(), time.process_time()
            for number in range(epoch * case.steps_per_epoch, (epoch + 1) * case.steps_per_epoch):
                outcome = step(batches.step(number), number + 1, 1e-4)
                losses.append(outcome.nll / outcome.target_tokens)
            epoch_seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - cpu_started)
    return {
        "second_epoch_seconds": epoch_seconds[1],
        "second_epoch_cpu_seconds": cpu_seconds[1],
        "first_epoch_seconds": epoch_seconds[0],
        "making_seconds": making_seconds,
        "cache_bytes": num_bytes,
        "second_epoch_loss_nats": statistics.mean(losses[case.steps_per_epoch :]),
    }


def measured_in_a_process(name: str, side: str) -> Figures:
    """One measurement."""
    done = finished([sys.executable, __file__, "--worker", side, "--case", name])
    return json.loads(done.output.splitlines()[-1])


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measured(options.worker, CASES[options.case], Path(folder))))
        return
    names = list(CASES) if options.case == "all" else [options.case]
    results = {
        name: compared(
            in_turn(SIDES, options.repetitions, partial(measured_in_a_process, name), name), baseline="plain"
        )
        for name in names
    }
    if options.json:
        print(json.dumps({name: {"case": asdict(CASES[name]), **result} for name, result in results.items()}))
        return
    for name, result in results.items():
        print_table(name, result, COLUMNS)


if __name__ == "__main__":
    main()
