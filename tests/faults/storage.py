"""A disk that fails, and files that are not what they were."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.harness import Bench, Row, Scale, finish, published, said_badly, spread

MIB = 1024**2


def failing_writes(bench: Bench, scale: Scale) -> list[Row]:
    """ENOSPC and EIO at file operations of a run: said clearly, and the run goes on when there is room."""
    wanted = _quiet(bench)
    rows = []
    for number in (errno.ENOSPC, errno.EIO):
        name = errno.errorcode[number]
        row = Row(
            "saving", f"{name} at a file operation", "exit code 2, then --resume ends with the same adapter"
        )
        rows.append(_failures(bench, row, str(number), scale.stages, wanted))
    return rows


def _quiet(bench: Bench) -> dict[str, bytes]:
    adapter = bench.folder / "quiet"
    if not (adapter / "adapters.safetensors").exists() or not (adapter / "report.md").exists():
        shutil.rmtree(adapter, ignore_errors=True)
        finish(bench.train_command(adapter), bench.environment())
    return published(adapter)


def _failures(bench: Bench, row: Row, kind: str, count: int, wanted: dict[str, bytes]) -> Row:
    folder, counted = bench.folder / f"failing-{kind}", bench.folder / "count"
    folder.mkdir(exist_ok=True)
    finish(bench.train_command(folder / "counted"), bench.injected(folder / "counted", 0, "kill", counted))
    total = int(counted.read_text())
    for at in spread(count, total):
        adapter = folder / f"at-{at}"
        done = finish(bench.train_command(adapter), bench.injected(adapter, at, kind))
        problem = None if done.returncode == 0 else said_badly(done)
        again = finish(bench.train_command(adapter), bench.environment())
        if again.returncode:
            problem = f"then exit code {again.returncode}: {again.stderr[-400:]}"
        elif published(adapter) != wanted:
            problem = "then another adapter"
        row.note(f"operation {at} of {total}: {problem}" if problem else None)
        shutil.rmtree(adapter, ignore_errors=True)
    return row


def full_disk(bench: Bench, scale: Scale) -> list[Row]:
    """A file system of a few sizes that really is full, where one can be mounted; a file size limit."""
    row = Row(
        "saving", "a disk (tmpfs) that is full", "exit code 2, older checkpoints load, --resume ends the run"
    )
    wanted = _quiet(bench)
    needed = sum(path.stat().st_size for path in (bench.folder / "quiet").rglob("*") if path.is_file())
    for share in spread(min(scale.stages, 12), 12):
        with _mounted(bench.folder / "small", round(needed * share / 12 * 1.4)) as mounted:
            if mounted is None:
                break
            adapter = mounted / "adapter"
            done = finish(bench.train_command(adapter), bench.environment())
            problem = said_badly(done) if done.returncode else None
            subprocess.run(["mount", "-o", "remount,size=64m", str(mounted)], check=True)
            again = finish(bench.train_command(adapter), bench.environment())
            if again.returncode or published(adapter) != wanted:
                problem = f"after making room: exit code {again.returncode}: {again.stderr[-300:]}"
            row.note(f"{share}/12 of what is needed: {problem}" if problem else None)
    limited = Row("saving", "RLIMIT_FSIZE", "exit code 2 or the run's end, then the same adapter")
    for kib in [4, 16, 40, 64, 100][: max(2, scale.stages)]:
        adapter = bench.folder / f"limited-{kib}"
        done = subprocess.run(
            bench.train_command(adapter),
            env=bench.environment(),
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda kib=kib: resource.setrlimit(resource.RLIMIT_FSIZE, (kib * 1024, kib * 1024)),
        )
        problem = said_badly(done) if done.returncode else None
        again = finish(bench.train_command(adapter), bench.environment())
        if again.returncode or published(adapter) != wanted:
            problem = f"without the limit: exit code {again.returncode}: {again.stderr[-300:]}"
        limited.note(f"{kib} KiB: {problem}" if problem else None)
        shutil.rmtree(adapter, ignore_errors=True)
    return [row, limited]


@contextmanager
def _mounted(folder: Path, num_bytes: int) -> Iterator[Path | None]:
    """A file system of that size; None where this process may not mount one."""
    folder.mkdir(exist_ok=True)
    size = f"size={max(num_bytes, 8192)}"
    done = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], capture_output=True, check=False
        )
        if shutil.which("mount") and os.geteuid() == 0
        else None
    )
    if done is None or done.returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def unusual_folders(bench: Bench, _scale: Scale) -> list[Row]:
    """Read-only, removed in mid-run, on another device, no longer permitted."""
    row = Row(
        "saving",
        "folder read-only, removed, on another device, or taken away",
        "exit code 2 or the same adapter",
    )
    wanted = _quiet(bench)
    done = _in_read_only(bench)
    if done is not None:
        row.note(_named("read-only file system", said_badly(done)))
    file = bench.folder / "a-file"
    file.write_text("", encoding="utf-8")
    for path in (file, file / "adapter"):
        row.note(
            _named(
                f"adapter path {path.name} in a file",
                said_badly(finish(bench.train_command(path), bench.environment())),
            )
        )
    row.note(_named("another device", _on_another_device(bench, wanted)))
    row.note(_named("removed in mid-run", _removed(bench)))
    return [row]


def _named(what: str, problem: str | None) -> str | None:
    return f"{what}: {problem}" if problem else None


def _in_read_only(bench: Bench) -> subprocess.CompletedProcess[str] | None:
    with _mounted(bench.folder / "read-only", MIB) as mounted:
        if mounted is None:
            return None
        subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
        return finish(bench.train_command(mounted / "adapter"), bench.environment())


def _on_another_device(bench: Bench, wanted: dict[str, bytes]) -> str | None:
    with _mounted(bench.folder / "device", 64 * MIB) as mounted:
        if mounted is None:
            return None
        adapter = bench.folder / "linked"
        (mounted / "real").mkdir()
        adapter.symlink_to(mounted / "real")
        done = finish(bench.train_command(adapter), bench.environment())
        if done.returncode:
            return f"exit code {done.returncode}: {done.stderr[-300:]}"
        return None if published(adapter) == wanted else "another adapter"


def _removed(bench: Bench) -> str | None:
    adapter = bench.folder / "removed"
    process = subprocess.Popen(
        bench.train_command(adapter, "--set", "training.max_steps=400", "--set", "training.num_epochs=100"),
        env=bench.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while (
        not list(adapter.glob("checkpoints/step-*"))
        and time.monotonic() < deadline
        and process.poll() is None
    ):
        time.sleep(0.01)
    moved = bench.folder / "moved-away"
    adapter.rename(moved)
    _, err = process.communicate(timeout=300)
    problem = said_badly(subprocess.CompletedProcess([], process.returncode, "", err))
    return problem or (None if list(moved.glob("checkpoints/step-*")) else "its checkpoints are gone")


def damage(bench: Bench, scale: Scale) -> list[Row]:
    """Flipped bits and cut files in checkpoints, adapters and quantized models."""
    wanted = _quiet(bench)
    return [
        _damaged_checkpoints(bench, scale, wanted),
        _damaged(bench, scale, "adapter", bench.folder / "quiet", _ask_adapter),
        _damaged(bench, scale, "quantized model", _quantized(bench), _ask_model),
        _damaged_hidden_states(bench, scale),
    ]


def _damaged_checkpoints(bench: Bench, scale: Scale, wanted: dict[str, bytes]) -> Row:
    row = Row(
        "checkpoint",
        "a bit flipped, or a file cut",
        "passed over by name; the run ends with the same adapter",
    )
    begun = bench.folder / "begun"
    finish(bench.train_command(begun, "--set", "training.max_steps=12"), bench.environment())
    newest = max(path.name for path in begun.glob("checkpoints/step-*"))
    trials = [(file, how) for file in sorted((begun / "checkpoints" / newest).iterdir()) for how in _HARMS]
    for file, how in trials[: max(3, scale.stages)]:
        adapter = bench.folder / "harmed"
        shutil.rmtree(adapter, ignore_errors=True)
        shutil.copytree(begun, adapter)
        _rewind(adapter)
        how(adapter / "checkpoints" / newest / file.name)
        done = finish(bench.train_command(adapter), bench.environment())
        problem = None
        if done.returncode or published(adapter) != wanted:
            problem = f"exit code {done.returncode}: {done.stderr[-300:]}"
        elif f"passed over {newest}" not in done.stderr:
            problem = "was not named"
        row.note(_named(f"{how.__name__} {file.name}", problem))
    return row


def _rewind(adapter: Path) -> None:
    for name in published(adapter):
        (adapter / name).unlink()


def _damaged(bench: Bench, scale: Scale, what: str, folder: Path, ask) -> Row:
    row = Row(what, "a bit flipped, or a file cut", "refused by name; never another answer")
    right = ask(bench, folder)
    if right.returncode:
        raise RuntimeError(right.stderr)
    files = [
        f for f in sorted(folder.iterdir()) if f.suffix in (".safetensors", ".json") and "run" not in f.name
    ]
    trials = [(file, how) for file in files for how in _HARMS]
    for file, how in trials[: max(3, scale.stages)]:
        harmed = bench.folder / "harmed"
        shutil.rmtree(harmed, ignore_errors=True)
        shutil.copytree(folder, harmed, ignore=shutil.ignore_patterns("checkpoints"))
        how(harmed / file.name)
        done = ask(bench, harmed)
        if done.returncode == 0:
            same = json.loads(done.stdout)["text"] == json.loads(right.stdout)["text"]
            problem = None if same and file.suffix == ".json" else "loaded as if nothing were wrong"
        else:
            problem = said_badly(done)
        row.note(_named(f"{how.__name__} {file.name}", problem))
    return row


def _damaged_hidden_states(bench: Bench, scale: Scale) -> Row:
    """The frozen prefix that a run keeps on disk; another run finds it harmed."""
    row = Row(
        "cached hidden states",
        "a bit flipped, or a file cut",
        "computed anew; the run ends with the same adapter",
    )
    options = ("--set", "training.cache_frozen_prefix=true", "--set", "lora.num_layers=1")
    quiet = bench.folder / "prefix-quiet"
    finish(bench.train_command(quiet, *options), bench.environment())
    wanted = published(quiet)
    (cache,) = (bench.folder / "cache" / "frozen-prefix").iterdir()
    trials = [(name, how) for name in ("hidden.bin", "manifest.json") for how in _HARMS]
    for name, how in trials[: max(3, scale.stages)]:
        how(cache / name)
        adapter = bench.folder / "prefix"
        done = finish(bench.train_command(adapter, *options), bench.environment())
        is_right = done.returncode == 0 and published(adapter) == wanted
        problem = None if is_right else f"exit code {done.returncode}: {done.stderr[-300:]}"
        row.note(_named(f"{how.__name__} {name}", problem))
        shutil.rmtree(adapter, ignore_errors=True)
    return row


def _ask(bench: Bench, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        *bench.train_command(Path())[:3],
        "infer",
        "o clube venceu?",
        "--max-tokens",
        "8",
        "--json",
        *options,
    ]
    return finish(command, bench.environment())


def _ask_adapter(bench: Bench, folder: Path) -> subprocess.CompletedProcess[str]:
    return _ask(bench, "--adapter-path", str(folder))


def _ask_model(bench: Bench, folder: Path) -> subprocess.CompletedProcess[str]:
    return _ask(bench, "--model", str(folder))


def _quantized(bench: Bench) -> Path:
    output = bench.folder / "quantized"
    if not output.exists():
        command = [*bench.train_command(Path())[:3], "quantize", str(bench.model), "--output", str(output)]
        finish(command, bench.environment())
    return output


def flip_early(path: Path) -> None:
    """In the first tenth: where a safetensors file has its header."""
    _flip(path, 0.1)


def flip_middle(path: Path) -> None:
    """In the middle."""
    _flip(path, 0.5)


def flip_late(path: Path) -> None:
    """Near the end: in a tensor."""
    _flip(path, 0.97)


def cut_half(path: Path) -> None:
    """Keep the first half."""
    os.truncate(path, path.stat().st_size // 2)


def cut_last(path: Path) -> None:
    """Lose the last byte that means something: a line's end after a JSON object does not."""
    os.truncate(path, len(path.read_bytes().rstrip(b"\n")) - 1)


def empty(path: Path) -> None:
    """As after a power loss."""
    os.truncate(path, 0)


_HARMS = (flip_early, flip_middle, flip_late, cut_half, cut_last, empty)


def _flip(path: Path, share: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * share)] ^= 0x10
    path.write_bytes(content)
