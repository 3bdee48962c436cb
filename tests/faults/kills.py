"""Killed at any moment, a run ends as if nothing had happened, and any other command can be run again."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.faults.harness import CLI, Bench, Row, Scale, finish, published, spread

MAX_PROCESSES = 4000


def training(bench: Bench, scale: Scale) -> list[Row]:
    """SIGKILL, SIGTERM and Ctrl-C while training; SIGKILL at each stage of saving."""
    quiet = bench.folder / "quiet"
    seconds, wanted = _timed_run(bench, quiet)
    return [
        _random_kills(bench, scale.kills, seconds, wanted),
        _kills_at_operations(bench, scale.stages, wanted),
        *(_signals(bench, number, code, scale.signals, seconds, wanted) for number, code in _SIGNALS),
    ]


_SIGNALS = ((signal.SIGTERM, 143), (signal.SIGINT, 130))


def _timed_run(bench: Bench, adapter: Path) -> tuple[float, dict[str, bytes]]:
    finish(bench.train_command(bench.folder / "warm"), bench.environment())  # the quantized model is cached
    started = time.monotonic()
    done = finish(bench.train_command(adapter), bench.environment())
    if done.returncode:
        raise RuntimeError(done.stderr)
    return time.monotonic() - started, published(adapter)


def _random_kills(bench: Bench, count: int, seconds: float, wanted: dict[str, bytes]) -> Row:
    """Runs that are killed again and again, until they are through; all their kills count."""
    row = Row("training", "SIGKILL at a random instant", "the adapter of the undisturbed run, bit for bit")
    rng, number = random.Random(0), 0
    while row.tried < count and number < MAX_PROCESSES:
        number += 1
        adapter = bench.folder / f"killed-{number}"
        kills = 0
        # Each attempt may take longer than the last: a run that never gets to its next checkpoint would
        # be killed for ever.
        for attempt in range(1, 12):
            last = attempt == 11 or row.tried + kills >= count
            code = _killed(bench, adapter, None if last else rng.uniform(0.1, seconds * (0.6 + attempt / 8)))
            if code == -signal.SIGKILL:
                kills += 1
                continue
            problem = None if code == 0 else f"run {number}: exit code {code} after {kills} kills"
            if code == 0 and published(adapter) != wanted:
                problem = f"run {number}: another adapter after {kills} kills"
            for _ in range(max(kills - 1, 0)):
                row.note(None)
            if kills or problem:
                row.note(problem)
            break
        shutil.rmtree(adapter, ignore_errors=True)
    return row


def _killed(bench: Bench, adapter: Path, after_seconds: float | None) -> int:
    process = subprocess.Popen(
        bench.train_command(adapter),
        env=bench.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        return process.wait(after_seconds if after_seconds is not None else 300)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _kills_at_operations(bench: Bench, count: int, wanted: dict[str, bytes]) -> Row:
    """Every write, fsync, rename, mkdir and delete of a run is an instant to die at."""
    row = Row("saving", "SIGKILL at a file operation of a run", "the adapter of the undisturbed run")
    return at_operations(
        bench,
        row,
        count,
        prepare=lambda folder: folder / "adapter",
        command=lambda adapter: bench.train_command(adapter),
        is_right=lambda adapter: published(adapter) == wanted,
    )


def at_operations(
    bench: Bench,
    row: Row,
    count: int,
    *,
    prepare: Callable[[Path], Path],
    command: Callable[[Path], Sequence[str]],
    is_right: Callable[[Path], bool],
) -> Row:
    """Kill a command at `count` of its file operations; each time, run it again and look at the result.

    Args:
        prepare: Given a folder that is watched, the path that the command writes to.
    """
    folder, counted = bench.folder / "operations", bench.folder / "count"
    _renewed(folder)
    finish(command(prepare(folder)), bench.injected(folder, 0, "kill", counted))
    total = int(counted.read_text())
    for at in spread(count, total):
        _renewed(folder)
        path = prepare(folder)
        done = finish(command(path), bench.injected(folder, at, "kill"))
        if done.returncode != -signal.SIGKILL:
            row.note(f"operation {at} of {total}: was not killed, exit code {done.returncode}")
            continue
        again = finish(command(path), bench.environment())
        is_there = "something here already" in again.stderr and is_right(path)  # killed when all was done
        if again.returncode and not is_there:
            row.note(f"operation {at} of {total}: then exit code {again.returncode}: {again.stderr[-500:]}")
            continue
        left = [p.name for p in path.parent.iterdir() if p != path]
        problem = None if is_right(path) else f"operation {at} of {total}: another result"
        row.note(problem or (f"operation {at} of {total}: left behind {left}" if left else None))
    return row


def _signals(
    bench: Bench, number: signal.Signals, code: int, count: int, seconds: float, wanted: dict[str, bytes]
) -> Row:
    """Asked to end, a run saves first."""
    row = Row(
        "training",
        f"{number.name} at a random instant",
        f"exit code {code} with the command that goes on, or -{number.value} before the run began; "
        "then the same adapter",
    )
    rng = random.Random(int(number))
    for trial in range(count):
        adapter = bench.folder / f"signal-{int(number)}-{trial}"
        process = subprocess.Popen(
            bench.train_command(adapter),
            env=bench.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(rng.uniform(0.0, seconds))
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
        row.note(_after_signal(bench, adapter, process.returncode, err, code, wanted))
        shutil.rmtree(adapter, ignore_errors=True)
    return row


def _after_signal(
    bench: Bench, adapter: Path, got: int, err: str, code: int, wanted: dict[str, bytes]
) -> str | None:
    if "Traceback" in err and got == code:
        return f"a traceback: {err[-500:]}"
    has_saved = any(adapter.glob("checkpoints/step-*")) and not (adapter / "report.md").exists()
    if got == code and has_saved and "--resume" not in err:
        return f"exit code {got} without the command that goes on: {err[-300:]}"
    if got not in (0, code, code - 128 and -(code - 128), 1):
        return f"exit code {got}: {err[-300:]}"
    again = finish(bench.train_command(adapter), bench.environment())
    if again.returncode:
        return f"exit code {again.returncode} when going on: {again.stderr[-500:]}"
    return None if published(adapter) == wanted else "another adapter"


def _renewed(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def commands(bench: Bench, scale: Scale) -> list[Row]:
    """SIGKILL at file operations of quantizing and of fusing: the same command gives a clean run's result."""
    adapter = bench.folder / "adapter"
    finish(bench.train_command(adapter), bench.environment())
    quantize = ["quantize", str(bench.model), "--output"]
    fuse = ["fuse", "--adapter-path", str(adapter), "--dequantize", "--output"]
    rows = []
    for name, arguments in (("quantize", quantize), ("fuse", fuse)):
        clean = bench.folder / f"clean-{name}"
        done = finish([*CLI, *arguments, str(clean)], bench.environment())
        if done.returncode:
            raise RuntimeError(done.stderr)
        row = Row(
            name, f"SIGKILL at a file operation of {name}", "the folder of a clean run, nothing beside it"
        )
        rows.append(
            at_operations(
                bench,
                row,
                min(scale.stages, 40),
                prepare=lambda folder: folder / "output",
                command=lambda output, arguments=arguments: [*CLI, *arguments, str(output)],
                is_right=lambda output, clean=clean: _weights(output) == _weights(clean),
            )
        )
        rows.append(_command_kills(bench, name, scale.signals, [*CLI, *arguments], clean))
    return rows


def _command_kills(bench: Bench, name: str, count: int, command: Sequence[str], clean: Path) -> Row:
    """At random instants, then again; most are between file operations."""
    row = Row(name, f"SIGKILL at a random instant of {name}", "the folder of a clean run, nothing beside it")
    folder, rng = bench.folder / "instants", random.Random(3)
    _renewed(folder)
    started = time.monotonic()
    finish([*command, str(folder / "output")], bench.environment())
    seconds = time.monotonic() - started
    while row.tried < count:
        _renewed(folder)
        output = folder / "output"
        process = subprocess.Popen(
            [*command, str(output)],
            env=bench.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(rng.uniform(0.05, seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if output.exists():
            problem = None if _weights(output) == _weights(clean) else "a folder that is not whole"
        else:
            again = finish([*command, str(output)], bench.environment())
            is_right = again.returncode == 0 and _weights(output) == _weights(clean)
            problem = None if is_right else f"exit code {again.returncode}: {again.stderr[-300:]}"
        left = [path.name for path in folder.iterdir() if path != output]
        row.note(problem or (f"left behind {left}" if left and not output.exists() else None))
    return row


def _weights(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".jinja")
    }
