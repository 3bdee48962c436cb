"""Several ranks on one machine, of which one dies or stands still."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time

import mlx.core as mx
import psutil

from tests.faults.harness import Bench, Row, Scale, finish, published

PROCESSES = ("--processes", "2", "--max-restarts", "20")


def faults(bench: Bench, scale: Scale) -> list[Row]:
    """SIGKILL and SIGSTOP of a rank at a random instant: noticed, all started again, the same adapter."""
    if not mx.distributed.is_available("ring"):
        return []
    quiet = bench.folder / "quiet-ranks"
    finish(bench.train_command(bench.folder / "warm"), bench.environment())  # the quantized model is cached
    started = time.monotonic()
    done = finish(bench.train_command(quiet, *PROCESSES), bench.environment())
    if done.returncode:
        raise RuntimeError(done.stderr)
    seconds, wanted = time.monotonic() - started, published(quiet)
    return [
        _harmed(bench, number, count, seconds, wanted)
        for number, count in ((signal.SIGKILL, scale.signals), (signal.SIGSTOP, max(1, scale.signals // 4)))
    ]


def _harmed(
    bench: Bench, number: signal.Signals, count: int, seconds: float, wanted: dict[str, bytes]
) -> Row:
    row = Row(
        "ranks",
        f"{number.name} of one of two ranks at a random instant",
        "exit code 0, the adapter of undisturbed ranks, no process left",
    )
    rng = random.Random(int(number))
    for trial in range(count):
        adapter = bench.folder / f"ranks-{int(number)}-{trial}"
        process = subprocess.Popen(
            bench.train_command(adapter, *PROCESSES),
            env=bench.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(rng.uniform(0.5, seconds))
        ranks = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        if ranks:
            _send(rng.choice(ranks), number)
        _, err = process.communicate(timeout=300)
        problem = None
        if process.returncode or published(adapter) != wanted:
            problem = f"trial {trial}: exit code {process.returncode}: {err[-400:]}"
        elif left := [rank.pid for rank in ranks if rank.is_running() and rank.status() != "zombie"]:
            problem = f"trial {trial}: processes {left} are left"
        row.note(problem)
        shutil.rmtree(adapter, ignore_errors=True)
    return row


def _send(rank: psutil.Process, number: signal.Signals) -> None:
    try:
        rank.send_signal(number)
    except psutil.NoSuchProcess:  # it ended in this very instant
        return
