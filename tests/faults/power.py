"""Power loss: every prefix of the file operations of some saves, as a disk might hold it.

A disk keeps what was synced. Of the rest it may keep all, nothing, names without contents, or any mix: file
contents are durable from the fsync of the file on, names from the fsync of their folder on. Operations are
recorded while real saves run; each prefix is put together again in a folder, in several such mixes, and what
is found there must load.
"""

from __future__ import annotations

import builtins
import io
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qlora.config import build_config
from mlx_qlora.errors import CheckpointError
from mlx_qlora.storage import make_folder, write_tensors
from mlx_qlora.training.checkpoint import CheckpointStore, Progress, RunIdentity
from tests.faults.harness import Bench, Row, Scale


@dataclass
class Log:
    """File operations under one folder, in order; contents as they were at each write-out and fsync."""

    root: Path
    operations: list[tuple[Any, ...]] = field(default_factory=list)

    def add(self, kind: str, *arguments: Any) -> None:
        """Note one operation."""
        self.operations.append((kind, *arguments))

    def mark(self, value: Any) -> None:
        """Something is promised from here on."""
        self.add("mark", value)


@contextmanager
def recorded(root: Path) -> Iterator[Log]:
    """Note every change under `root` that is made while this is open."""
    log = Log(root)
    before = (io.open, builtins.open, os.fsync, os.rename, os.replace, os.mkdir, os.unlink, os.rmdir)
    rmtree = shutil.rmtree

    def inside(path: Any) -> str | None:
        try:
            absolute = Path(os.fspath(path)).absolute()
        except TypeError:
            return None
        return str(absolute.relative_to(root)) if absolute.is_relative_to(root) else None

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        handle = before[0](file, mode, *args, **kwargs)
        if any(c in mode for c in "wax+") and (path := inside(file)) is not None:
            log.add("create", path, "w" in mode)
            close = handle.close

            def closed() -> None:
                is_first = not handle.closed
                close()
                if is_first:
                    log.add("write", path, Path(file).read_bytes() if Path(file).exists() else b"")

            handle.close = closed
        return handle

    def fsync(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        target = Path(f"/proc/self/fd/{number}").readlink()
        before[2](descriptor)
        if (path := inside(target)) is not None:
            if target.is_dir():
                log.add("sync-folder", path)
            else:
                log.add("write", path, target.read_bytes())
                log.add("sync", path)

    def renamed(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(source: Any, target: Any, **kwargs: Any) -> None:
            one, other = inside(source), inside(target)
            original(source, target, **kwargs)
            if one is not None and other is not None:
                log.add("rename", one, other)

        return call

    def named(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> None:
            original(path, *args, **kwargs)
            if "dir_fd" not in kwargs and (name := inside(path)) is not None:
                log.add(kind, name)

        return call

    def remove_tree(path: Any, *args: Any, **kwargs: Any) -> None:
        is_there = Path(path).exists()
        rmtree(path, *args, **kwargs)
        if is_there and (name := inside(path)) is not None:
            log.add("remove-tree", name)

    io.open = builtins.open = opened  # type: ignore[assignment]
    os.fsync, os.rename, os.replace = fsync, renamed(before[3]), renamed(before[4])
    os.mkdir = named("mkdir", before[5])
    os.unlink, os.rmdir = named("delete", before[6]), named("delete", before[7])
    shutil.rmtree = remove_tree  # type: ignore[assignment]
    try:
        yield log
    finally:
        io.open, builtins.open, os.fsync, os.rename, os.replace, os.mkdir, os.unlink, os.rmdir = before
        shutil.rmtree = rmtree


@dataclass
class _Node:
    """A file or a folder: what is in memory, and what the disk holds for sure."""

    is_folder: bool
    content: bytes = b""
    durable: bytes | None = None
    names: dict[str, _Node] = field(default_factory=dict)
    durable_names: dict[str, _Node] = field(default_factory=dict)


class Disk:
    """A folder after some operations, with what a power loss may do to it."""

    def __init__(self) -> None:
        self.root = _Node(is_folder=True)

    def apply(self, operation: tuple[Any, ...]) -> None:
        """Carry out one recorded operation."""
        kind, *arguments = operation
        if kind == "mark":
            return
        parent, name = self._at(arguments[0])
        if kind == "create":
            if arguments[1] or name not in parent.names:
                # An opened file that is truncated keeps its place: whoever holds the old name sees it empty.
                node = parent.names.setdefault(name, _Node(is_folder=False))
                node.content = b"" if arguments[1] else node.content
        elif kind == "write":
            if name in parent.names:
                parent.names[name].content = arguments[1]
        elif kind == "sync":
            parent.names[name].durable = parent.names[name].content
        elif kind == "sync-folder":
            node = parent.names[name] if name else self.root
            node.durable_names = dict(node.names)
        elif kind == "mkdir":
            parent.names[name] = _Node(is_folder=True)
        elif kind == "rename":
            other, new = self._at(arguments[1])
            other.names[new] = parent.names.pop(name)
        elif kind in ("delete", "remove-tree"):
            parent.names.pop(name, None)
        else:
            raise ValueError(kind)

    def put(self, folder: Path, choose: Callable[[str, int], int]) -> None:
        """Write what is left after a power loss. `choose(what, n)` gives a number below n."""
        self._put(self.root, folder, choose)

    def _put(self, node: _Node, folder: Path, choose: Callable[[str, int], int]) -> None:
        folder.mkdir()
        names = node.names if choose("names", 2) else node.durable_names
        for name, child in names.items():
            if child.is_folder:
                self._put(child, folder / name, choose)
                continue
            durable = child.durable if child.durable is not None else b""
            kept = [durable, child.content, child.content[: len(child.content) // 2]]
            is_synced = child.durable == child.content
            (folder / name).write_bytes(durable if is_synced else kept[choose("content", 3)])

    def _at(self, path: str) -> tuple[_Node, str]:
        *parents, name = Path(path).parts or ("",)
        node = self.root
        for part in parents:
            node = node.names[part]
        return node, name


def chooser(seed: int) -> Callable[[str, int], int]:
    """0: only what was synced; 1: all; 2: names without contents; others: a mix of all of these."""
    if seed == 0:
        return lambda _what, _n: 0
    if seed == 1:
        return lambda _what, _n: 1
    if seed == 2:
        return lambda what, _n: int(what == "names")
    rng = random.Random(seed)
    return lambda _what, n: rng.randrange(n)


def losses(bench: Bench, scale: Scale) -> list[Row]:
    """Saves of a training run, cut off at every operation."""
    row = Row(
        "saving", "power lost after an operation", "the newest checkpoint that was promised, or a later one"
    )
    folder = bench.folder / "disk"
    folder.mkdir()
    store, saved = _saves(folder)
    disk, promised = Disk(), 0
    mixes = 3 + max(1, scale.stages // 20)
    for number, operation in enumerate(saved.operations):
        disk.apply(operation)
        promised = operation[1] if operation[0] == "mark" else promised
        for seed in range(mixes):
            copy = bench.folder / "after"
            shutil.rmtree(copy, ignore_errors=True)
            disk.put(copy, chooser(seed if seed < 3 else 1000 * number + seed))
            problem = _after_loss(copy, store.identity, promised)
            row.note(f"operation {number} {operation[:2]}, mix {seed}: {problem}" if problem else None)
    return [row]


def _saves(folder: Path) -> tuple[CheckpointStore, Log]:
    """Five checkpoints and the adapters published with them."""
    identity = RunIdentity(build_config({}), "sha256:base", "sha256:data")
    adapter = folder / "adapter"
    store = CheckpointStore(adapter / "checkpoints", identity, keep=2)
    with recorded(folder) as log:
        make_folder(adapter / "checkpoints")
        for step in range(1, 6):
            tensors = {"a.lora_a": mx.full((8, 4), step), "a.lora_b": mx.full((4, 8), -step)}
            progress = Progress(step=step, best_loss=1.0 / step, best_step=step)
            store.save(progress, tensors, {"m": mx.full((16,), step)})
            log.mark(step)
            write_tensors(adapter / "adapters.safetensors", tensors, {"format": "mlx"})
    return store, log


def _after_loss(folder: Path, identity: RunIdentity, promised: int) -> str | None:
    checkpoints = folder / "adapter" / "checkpoints"
    if not promised and not checkpoints.is_dir():
        return None
    try:
        found, _ = CheckpointStore(checkpoints, identity, keep=2).load_newest()
    except CheckpointError as error:
        return str(error).splitlines()[0] if promised else None
    if found.progress.step < promised:
        return f"step {found.progress.step} is the newest, and {promised} was promised"
    step = found.progress.step
    is_right = mx.array_equal(found.adapter["a.lora_a"], mx.full((8, 4), step)).item()
    return None if is_right else f"the tensors of step {step} are others"
