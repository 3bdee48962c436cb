"""What an update costs against model size, row length, ranks and link: constants measured, then formulas.

    cd docs; python ../benchmarks/scaling.py --output scaling.json --document SCALING.md --figure scaling.png
    cd docs; python ../benchmarks/scaling.py --read scaling.json --document SCALING.md   # without measuring

Measured here: processor seconds of `TrainStep` per token on random int4 Llamas in float32, one BLAS thread;
seconds of the two exchanges an update makes (`Ranks.total`, `Ranks.summed`) between 2 and 4 processes on the
loopback, and between two network namespaces over a link with a delay or a limited rate (slow_link.py; needs
root). Each figure is the least of its repetitions: other programs only add. Computed: how evenly rows of
unequal length come to lie on ranks. All else in the tables follows from these by the formulas in
docs/SCALING.md, at link speeds and a chip's speed that are given, not measured, and named so.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from slow_link import slow_link, why_not

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # processor seconds of one core

import mlx_qlora  # noqa: F401  # before MLX, for which it loads a BLAS

MODELS = ((256, 2), (256, 4), (512, 2))
"""Hidden size and layers."""
LENGTHS = (128, 256, 512)
EXCHANGED_BYTES = (4, 65_536, 1_048_576, 4_194_304)
CALLS_IN_A_ROW = (10, 10, 2, 2)
"""Of an exchange: a single one may find the other rank's message there already."""
LINKS = ({"delay_seconds": 0.005}, {"delay_seconds": 0.02}, {"bits_per_second": 2e7})
VOCABULARY = 256

# Given, not measured: one way in seconds, bytes a second.
NOMINAL_LINKS = {
    "Thunderbolt bridge (20 Gbit/s)": (100e-6, 2.5e9),
    "10 Gbit/s Ethernet": (100e-6, 1.25e9),
    "1 Gbit/s Ethernet": (200e-6, 125e6),
    "Wi-Fi (300 Mbit/s)": (3e-3, 37.5e6),
}
CHIP_FLOPS = 5e12
"""Given, not measured: what a Mac's GPU does in training steps, floating-point operations a second."""
NAMED_MODELS = {"1B": (1.2e9, 16, 2048, 1.6e6), "7B": (7.0e9, 32, 4096, 4.7e6)}
"""Parameters in linear layers, layers, hidden size, and those of a rank-8 adapter on q, k and v."""
BUCKET_BYTES = 8 * 1024**2  # as mlx_qlora.training.distributed


def linear_parameters(hidden: int, layers: int) -> int:
    """Of a random Llama of this benchmark, without embedding and head."""
    return layers * (4 * hidden**2 + 3 * hidden * intermediate(hidden))


def intermediate(hidden: int) -> int:
    """Width of the feed-forward layers."""
    return hidden * 11 // 4 // 64 * 64


def step_seconds(hidden: int, layers: int, length: int, repetitions: int) -> float:
    """One update of one row of `length` tokens, rank-8 adapters on q, k and v."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.models import llama

    from mlx_qlora.config import LoraConfig, TrainingConfig
    from mlx_qlora.dataset.batches import Batch
    from mlx_qlora.lora.attach import attach
    from mlx_qlora.objective.loss import objective_for
    from mlx_qlora.quantization.dense import dense_products
    from mlx_qlora.training.optimizer import build_optimizer
    from mlx_qlora.training.step import TrainStep

    mx.random.seed(0)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=intermediate(hidden),
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
            rms_norm_eps=1e-5,
            vocab_size=VOCABULARY,
        )
    )
    nn.quantize(model, 64, 4)
    attach(model, LoraConfig(rank=8), 0)
    config = TrainingConfig()
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, (1, length + 1)).astype(np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], np.ones((1, length), bool), length)
    with dense_products(model):
        step = TrainStep(objective_for(model.train()), build_optimizer(config), config)
        return least(repetitions, lambda: step([batch], 1, 1e-4), time.process_time)


def least(repetitions: int, work: Any, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of the fastest of so many calls, after one that does not count."""
    work()
    times = []
    for _ in range(repetitions):
        began = clock()
        work()
        times.append(clock() - began)
    return min(times)


def exchange_here(repetitions: int) -> None:
    """As a rank: time both exchanges; rank 0 prints them."""
    import mlx.core as mx

    from mlx_qlora.training.distributed import Ranks

    ranks = Ranks(mx.distributed.init(strict=True, backend="ring"))
    found: dict[str, Any] = {
        "total": in_a_row(10, repetitions, lambda: ranks.total(1.0, 2.0, 3.0)),
        "summed": {},
    }
    for num_bytes, calls in zip(EXCHANGED_BYTES, CALLS_IN_A_ROW, strict=True):
        tree = {"x": mx.ones((num_bytes // 4,))}
        seconds = in_a_row(calls, repetitions, lambda tree=tree: mx.eval(ranks.summed(tree)))
        found["summed"][num_bytes] = seconds
    if ranks.is_first:
        print(json.dumps(found))


def in_a_row(calls: int, repetitions: int, work: Any) -> float:
    """Seconds of one of so many calls in a row, in the fastest of the repetitions."""
    return least(repetitions, lambda: [work() for _ in range(calls)]) / calls


def exchanged(ranks: int, repetitions: int, addresses: Sequence[str], prefixes: Sequence[list[str]]) -> Any:
    """Times of the exchanges between so many processes."""
    from mlx_qlora.training.launcher import random_ports

    with tempfile.TemporaryDirectory() as folder:
        hostfile = Path(folder) / "ring.json"
        pairs = zip(addresses, random_ports(ranks), strict=True)
        hostfile.write_text(json.dumps([[f"{address}:{port}"] for address, port in pairs]))
        command = [sys.executable, __file__, "--exchange", "--repetitions", str(repetitions)]
        processes = [
            subprocess.Popen(
                [*prefixes[rank], *command],
                env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)},
                stdout=subprocess.PIPE,
            )
            for rank in range(ranks)
        ]
        outputs = [process.communicate()[0] for process in processes]
    return json.loads(outputs[0])


def measured(repetitions: int) -> dict[str, Any]:
    """Everything that is measured, and where."""
    import mlx.core as mx

    steps = []
    for hidden, layers in MODELS:
        for length in LENGTHS:
            seconds = step_seconds(hidden, layers, length, repetitions)
            steps.append({"hidden": hidden, "layers": layers, "length": length, "seconds": seconds})
            print(f"step {hidden} × {layers}, {length} tokens: {seconds:.3f} s", file=sys.stderr)
    exchanges = []
    for ranks in (2, 4):
        found = exchanged(ranks, repetitions, ["127.0.0.1"] * ranks, [[]] * ranks)
        exchanges.append({"ranks": ranks, "link": "loopback", **found})
    for link in LINKS if why_not() is None else ():
        with slow_link(**link) as made:
            inside = [["ip", "netns", "exec", name] for name in made.namespaces]
            found = exchanged(2, repetitions, made.addresses, inside)
            exchanges.append({"ranks": 2, "link": link, **found})
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    device = f"{os.cpu_count()} processors, {mx.default_device().type.name}, MLX {mx.__version__}"
    machine = f"{platform.machine()}, {device}"
    return {"machine": machine, "load": load, "steps": steps, "exchanges": exchanges, "balance": balance()}


def balance() -> list[dict[str, float]]:
    """The share of the ranks' time that is work, rows of log-normal lengths with a median of 60 tokens."""
    from mlx_qlora.dataset.batches import Batches
    from mlx_qlora.dataset.records import Example

    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(math.log(60), 0.7, 2048).astype(int), 4, 512)
    examples = [Example(np.ones(n, np.int32), np.ones(n, bool), "") for n in lengths]
    found = []
    for rows in (4, 8, 16, 32):
        for ranks in (2, 4):
            batches = [Batches(examples, rows, 1, 0).shared(rank, ranks) for rank in range(ranks)]
            used, paid = 0, 0
            for step in range(2048 // rows):
                loads = [sum(b.tokens for b in part.step(step)) for part in batches]
                used, paid = used + sum(loads), paid + ranks * max(loads)
            found.append({"rows": rows, "ranks": ranks, "efficiency": used / paid})
    return found


def token_work(hidden: int, layers: int, length: float) -> list[float]:
    """What the three constants of compute are multiplied with, per token of one row."""
    return [linear_parameters(hidden, layers), layers * hidden * length, layers / length]


def fitted(found: dict[str, Any]) -> dict[str, Any]:
    """The constants of the formulas.

    `compute` holds seconds per parameter and token; per layer, hidden unit, position and token; and per layer
    of a micro-batch. `hops` has for each link the seconds of one hop and the bytes a second.
    """
    work = np.array([token_work(s["hidden"], s["layers"], s["length"]) for s in found["steps"]])
    per_token = np.array([s["seconds"] / s["length"] for s in found["steps"]])
    compute, *_ = np.linalg.lstsq(work / per_token[:, None], np.ones(len(per_token)), rcond=None)
    hops = {}
    for exchange in found["exchanges"]:
        ranks, times = exchange["ranks"], {int(k): v for k, v in exchange["summed"].items()}
        small, medium, large = (times[size] for size in (EXCHANGED_BYTES[0], *EXCHANGED_BYTES[-2:]))
        hop = small / (2 * (ranks - 1))
        more = EXCHANGED_BYTES[-1] - EXCHANGED_BYTES[-2]
        rate = 2 * (ranks - 1) / ranks * more / max(large - medium, 1e-9)
        hops[name_of(exchange)] = {"hop_seconds": hop, "bytes_per_second": rate}
    error = float(np.max(np.abs(work @ compute / per_token - 1)))
    return {"compute": compute.tolist(), "largest_error": error, "hops": hops}


def name_of(exchange: dict[str, Any]) -> str:
    """Of a link, for a table."""
    link = exchange["link"]
    if link == "loopback":
        return f"loopback, {exchange['ranks']} ranks"
    told = [f"{1e3 * link['delay_seconds']:.0f} ms one way"] if "delay_seconds" in link else []
    told += [f"{link['bits_per_second'] / 1e6:.0f} Mbit/s"] if "bits_per_second" in link else []
    return f"{', '.join(told)}, {exchange['ranks']} ranks"


def exchange_seconds(ranks: int, num_bytes: float, hop: float, rate: float) -> float:
    """All exchanges of one update: two gathers of a few numbers, and the sum of the gradients in buckets."""
    if ranks == 1:
        return 0.0
    buckets = math.ceil(num_bytes / BUCKET_BYTES)
    gathers = 2 * (ranks - 1) * hop
    return gathers + 2 * (ranks - 1) * (buckets * hop + num_bytes / (ranks * rate))


def update_seconds(
    ranks: int, rows: int, length: int, model: tuple[float, int, int, float], link: tuple[float, float]
) -> float:
    """One update of rows of one length on chips of `CHIP_FLOPS`: the largest share, then the exchanges."""
    parameters, layers, hidden, adapter = model
    per_token = (4 * parameters + 6 * layers * hidden * length) / CHIP_FLOPS
    share = math.ceil(rows / ranks)
    return share * length * per_token + exchange_seconds(ranks, 4 * adapter, *link)


def document(found: dict[str, Any], path: Path) -> None:
    """Put the tables between the marks of docs/SCALING.md."""
    begin, end = "<!-- tables: benchmarks/scaling.py -->", "<!-- end of tables -->"
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(begin)
    _, after = rest.split(end)
    path.write_text(f"{before}{begin}\n\n{tables(found)}\n\n{end}{after}", encoding="utf-8")


def tables(found: dict[str, Any]) -> str:
    """All tables, as Markdown."""
    constants = fitted(found)
    a, b, c = constants["compute"]
    parts = [
        f"Measured on: {found['machine']}; load average {found['load']:.1f} at the end.",
        f"**Compute** (measured, fitted): a = {a:.3g} s per parameter and token ({4 / a / 1e9:.1f} GFLOP/s), "
        f"b = {b:.3g} s per layer, hidden unit, position and token, c = {1e3 * c:.3g} ms per layer of a "
        f"micro-batch; the fit is off by at most {100 * constants['largest_error']:.0f} %.",
        table(["hidden × layers", *(f"{n} tokens, ms per token" for n in LENGTHS)], step_rows(found)),
        "**Exchanges** (measured), milliseconds:",
        table(
            ["link", "total", *(f"sum of {sized(n)}" for n in EXCHANGED_BYTES), "a hop, ms", "MB/s"],
            exchange_rows(found, constants),
        ),
        "**Balance** (computed from the sharding itself), share of the ranks' time that is work:",
        table(["rows of an update", "2 ranks", "4 ranks"], balance_rows(found["balance"])),
        f"**Speed-up** (formulas; chips of {CHIP_FLOPS / 1e12:.0f} TFLOP/s and links as named, given and not "
        "measured), rows of 512 tokens:",
        table(
            ["model, link", *(f"{n} ranks, {rows} rows" for rows in (4, 16) for n in (2, 4))], speedup_rows()
        ),
    ]
    return "\n\n".join(parts)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sized(num_bytes: int) -> str:
    """Bytes for a heading."""
    return f"{num_bytes / 1024**2:.0f} MiB" if num_bytes >= 1024**2 else f"{num_bytes:,} B"


def step_rows(found: dict[str, Any]) -> list[list[str]]:
    """Milliseconds per token."""
    times = {(s["hidden"], s["layers"], s["length"]): s["seconds"] for s in found["steps"]}
    return [[f"{h} × {n}", *(f"{1e3 * times[h, n, t] / t:.3f}" for t in LENGTHS)] for h, n in MODELS]


def exchange_rows(found: dict[str, Any], constants: dict[str, Any]) -> list[list[str]]:
    """One link a row."""
    rows = []
    for exchange in found["exchanges"]:
        name = name_of(exchange)
        hop = constants["hops"][name]
        sums = [f"{1e3 * seconds:.2f}" for seconds in exchange["summed"].values()]
        rates = [f"{1e3 * hop['hop_seconds']:.2f}", f"{hop['bytes_per_second'] / 1e6:.1f}"]
        rows.append([name, f"{1e3 * exchange['total']:.2f}", *sums, *rates])
    return rows


def balance_rows(found: Sequence[dict[str, float]]) -> list[list[str]]:
    """One size of update a row."""
    share = {(one["rows"], one["ranks"]): one["efficiency"] for one in found}
    return [[str(rows), *(f"{100 * share[rows, n]:.0f} %" for n in (2, 4))] for rows in (4, 8, 16, 32)]


def speedup_rows() -> list[list[str]]:
    """One model and link a row."""
    rows = []
    for name, model in NAMED_MODELS.items():
        for link, speed in NOMINAL_LINKS.items():
            alone = {n: update_seconds(1, n, 512, model, speed) for n in (4, 16)}
            gains = [alone[n] / update_seconds(r, n, 512, model, speed) for n in (4, 16) for r in (2, 4)]
            rows.append([f"{name}, {link}", *(f"{gain:.2f}" for gain in gains)])
    return rows


def figure(found: dict[str, Any], path: Path) -> None:
    """Four pictures: a token against length, an exchange against bytes, speed-up against ranks and link."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    constants = fitted(found)
    drawn, ((tokens, exchange), (ranks, rates)) = plt.subplots(2, 2, figsize=(10, 7.5), layout="constrained")
    lengths = np.geomspace(64, 2048, 40)
    for hidden, layers in MODELS:
        times = [1e3 * np.dot(constants["compute"], token_work(hidden, layers, length)) for length in lengths]
        line = tokens.plot(lengths, times)
        points = [(s["length"], 1e3 * s["seconds"] / s["length"]) for s in found["steps"]
                  if (s["hidden"], s["layers"]) == (hidden, layers)]  # fmt: skip
        tokens.plot(*zip(*points, strict=True), "o", color=line[0].get_color(), label=f"{hidden} × {layers}")
    tokens.set(
        xscale="log", xlabel="tokens of a row", ylabel="ms per token", title="measured (points) and fitted"
    )
    for one in found["exchanges"]:
        sizes = [int(size) for size in one["summed"]]
        exchange.plot(sizes, [1e3 * t for t in one["summed"].values()], "o-", label=name_of(one))
    exchange.set(
        xscale="log", yscale="log", xlabel="bytes summed", ylabel="ms", title="sum over ranks, measured"
    )
    model = NAMED_MODELS["7B"]
    for name, link in NOMINAL_LINKS.items():
        gains = [
            update_seconds(1, 16, 512, model, link) / update_seconds(n, 16, 512, model, link)
            for n in range(1, 21)
        ]
        ranks.plot(range(1, 21), gains, ".-", label=name)
    ranks.set(
        xlabel="ranks", ylabel="times as fast", title="7B, 16 rows of 512: formula, chip and links given"
    )
    speeds = np.geomspace(1e5, 1e10, 60)
    for count in (2, 4):
        for rows in (4, 16):
            gains = [
                update_seconds(1, rows, 512, model, (1e-3, speed))
                / update_seconds(count, rows, 512, model, (1e-3, speed))
                for speed in speeds
            ]
            rates.plot(speeds, gains, label=f"{count} ranks, {rows} rows")
    rates.set(
        xscale="log", xlabel="link, bytes a second (1 ms a hop)", ylabel="times as fast", title="7B: formula"
    )
    for axes in (tokens, exchange, ranks, rates):
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    drawn.savefig(path, dpi=110)


def main() -> None:
    """Measure or read, then write what is asked for."""
    parser = argparse.ArgumentParser(description="What an update costs, measured and by formula.")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--read", type=Path, help="figures of an earlier run, instead of measuring")
    parser.add_argument("--output", type=Path, help="where the figures go, as JSON")
    parser.add_argument("--document", type=Path, help="the page whose tables are replaced")
    parser.add_argument("--figure", type=Path, help="where the picture goes")
    parser.add_argument("--exchange", action="store_true", help="be a rank (used by itself)")
    options = parser.parse_args()
    if options.exchange:
        exchange_here(options.repetitions)
        return
    found = json.loads(options.read.read_text()) if options.read else measured(options.repetitions)
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")
    if options.document:
        document(found, options.document)
    if options.figure:
        figure(found, options.figure)
    if not (options.output or options.document):
        print(tables(found))


if __name__ == "__main__":
    main()
