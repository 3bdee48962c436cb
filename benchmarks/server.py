"""Streams of `mlx-qlora serve` and of mlx_lm.server, many at a time, with clients that leave.

    python benchmarks/server.py --seconds 180

Both serve the same random int4 Llama with the same adapter, each in a process of its own, in turn. So many
streams are open all the time; each asks a question drawn from a seed, one in five leaves in the middle of its
answer, by the same seed on both sides. Printed are, for each side:

- tokens per second, of answers that came whole, and seconds to the first text (median, 95th percentile);
- answers lost: neither left by us nor ended with [DONE] and all their tokens;
- memory of the process (resident set, sampled) at the end over that after a third of the time;
- for ours, tokens per second when the streams ask for several adapters at once, over those with one.

Exit code 1 if ours loses an answer, or its memory is not flat within 5 %.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from pairing import Figures, compared, environment, print_table
from random_llama import write_random_chat_llama

WORDS = (
    "clube",
    "partida",
    "estádio",
    "gols",
    "escola",
    "cidade",
    "venceu",
    "fundou",
    "quem",
    "quando",
    "onde",
)
LEAVES = 0.2
"""Of the streams, so many leave before their end."""
SAMPLE_SECONDS = 0.5
FLAT = 0.05
PROMPT_CACHE_MIB = 48
"""Of ours: full before memory is looked at. The default, 256, takes minutes to fill, and grows till then."""


@dataclass
class Tally:
    """What the clients of one run saw."""

    num_whole: int = 0
    num_left: int = 0
    lost: list[str] = field(default_factory=list)
    num_tokens: int = 0
    """Of whole answers."""
    first_seconds: list[float] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    """Seconds since the start, and bytes resident."""


@dataclass(frozen=True)
class Load:
    """What the clients do."""

    num_streams: int
    seconds: float
    max_tokens: int
    names: tuple[str, ...]
    """The `model` fields drawn from."""
    leaves: float = LEAVES


def main(
    seconds: Annotated[float, typer.Option(help="Of load, for each measurement.")] = 60,
    streams: Annotated[int, typer.Option(min=1, help="Open at the same time.")] = 50,
    max_tokens: Annotated[int, typer.Option(min=2, help="Of each answer.")] = 48,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers generated together, on both sides.")] = 32,
    hidden: Annotated[int, typer.Option(help="Width of the random model.")] = 256,
    layers: Annotated[int, typer.Option(help="Its depth.")] = 4,
    adapters: Annotated[int, typer.Option(min=2, help="For the mixed batch.")] = 4,
    repetitions: Annotated[int, typer.Option(min=1, help="Of each measurement, in turn.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Measure both, print the table."""
    with tempfile.TemporaryDirectory(prefix="server_") as temporary:
        folder = Path(temporary)
        write_random_chat_llama(folder / "model", hidden=hidden, layers=layers)
        paths = [save_adapter(folder / "model", folder / f"a{i}", seed=i) for i in range(adapters)]
        load = Load(streams, seconds, max_tokens, ("a0",))
        rounds: dict[str, list[Figures]] = {"mlx_lm": [], "ours": []}
        mixed: list[Figures] = []
        for repetition in range(repetitions):
            for side in list(rounds) if repetition % 2 == 0 else reversed(rounds):
                with (theirs if side == "mlx_lm" else ours)(folder / "model", paths, max_batch) as server:
                    rounds[side].append(measured(server, side, load))
                    if side == "ours":
                        mixed.append(mixed_ratio(server, load, [path.name for path in paths]))
    result = {
        "settings": {"seconds": seconds, "streams": streams, "max_tokens": max_tokens,
                     "max_batch": max_batch, "hidden": hidden, "layers": layers, "adapters": adapters},
        "sides": compared(rounds, "mlx_lm"),
        "mixed": {name: statistics.median(run[name] for run in mixed) for name in mixed[0]},
    }  # fmt: skip
    if as_json:
        print(json.dumps(result))
    else:
        show(result)
    if problems := verdict(result["sides"]["ours"]["median"]):
        raise SystemExit("; ".join(problems))


def verdict(ours: dict[str, float]) -> list[str]:
    """What must not be, whatever the machine."""
    problems = [f"{ours['lost']:g} answers lost"] if ours["lost"] else []
    if abs(ours["memory_ratio"] - 1) > FLAT:
        problems.append(f"memory is not flat: {ours['memory_ratio']:.3f}")
    return problems


COLUMNS = {
    "tokens_per_second": ("tokens/s", 1, 1),
    "first_token_seconds": ("first text, s", 1, 3),
    "first_token_seconds_p95": ("its p95, s", 1, 3),
    "memory_mib": ("MiB", 1, 0),
}


def show(result: dict[str, Any]) -> None:
    """The table, and the mixed batch."""
    title = ", ".join(f"{name} {value:g}" for name, value in result["settings"].items())
    print_table(title, result["sides"], COLUMNS)
    for side, figures_of in result["sides"].items():
        seen = figures_of["median"]
        print(
            f"{side}: {seen['answers']:g} whole answers, {seen['left']:g} left, {seen['lost']:g} lost; "
            f"memory at the end {seen['memory_ratio']:.3f} of that after a third"
        )
    mixed = result["mixed"]
    print(f"several adapters in a batch: {mixed['mixed']:.1f} tokens/s, one: {mixed['single']:.1f}, "
          f"ratio {mixed['ratio']:.3f}")  # fmt: skip


def save_adapter(model: Path, folder: Path, *, seed: int) -> Path:
    """A random adapter of that base, in mlx-lm's format."""
    import mlx.core as mx

    from mlx_qlora.config import LoraConfig, ModelConfig, QuantizationConfig
    from mlx_qlora.dataset import ensure_chat_template
    from mlx_qlora.lora import adapter
    from mlx_qlora.lora.attach import attach
    from mlx_qlora.weights.loader import load_base

    base = load_base(ModelConfig(path=str(model)), QuantizationConfig(scheme="none"))
    template = ensure_chat_template(base.tokenizer)
    lora = LoraConfig(rank=8)
    attach(base.model, lora, seed)
    tensors = {
        name: mx.random.normal(array.shape, key=mx.random.key(seed * 1000 + index)) * 0.05
        for index, (name, array) in enumerate(sorted(adapter.adapter_tensors(base.model).items()))
    }
    info = adapter.AdapterInfo(
        model=ModelConfig(path=str(model)),
        quantization=QuantizationConfig(scheme="none"),
        lora=lora,
        fingerprint=base.fingerprint,
        chat_template=template,
        chat_template_sha256=adapter.text_sha256(template),
    )
    adapter.save_adapter(folder, tensors, info, len(base.model.layers))
    return folder


@dataclass(frozen=True)
class Server:
    """A running server."""

    port: int
    process: psutil.Process


@contextmanager
def ours(model: Path, adapters: Sequence[Path], max_batch: int):
    """`mlx-qlora serve` with all adapters."""
    port = free_port()
    pairs = [part for path in adapters for part in ("--adapter", f"{path.name}={path}")]
    command = [sys.executable, "-m", "mlx_qlora", "serve", "--model", str(model), "--port", str(port), *pairs,
               "--max-batch", str(max_batch), "--max-queue", "512",
               "--prompt-cache-mib", str(PROMPT_CACHE_MIB)]  # fmt: skip
    with running(command, port) as server:
        yield server


@contextmanager
def theirs(model: Path, adapters: Sequence[Path], max_batch: int):
    """mlx_lm.server with the first adapter."""
    port = free_port()
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(model), "--port", str(port),
               "--adapter-path", str(adapters[0]), "--decode-concurrency", str(max_batch),
               "--log-level", "ERROR"]  # fmt: skip
    with running(command, port) as server:
        yield server


@contextmanager
def running(command: Sequence[str], port: int):
    """A server process, from its first good answer to its end."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment(has_blas=True))
        try:
            until = time.monotonic() + 180
            while not is_up(port):
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise SystemExit(f"did not start: {' '.join(command)}\n{log.read().decode()[-3000:]}")
                time.sleep(0.1)
            yield Server(port, psutil.Process(process.pid))
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def is_up(port: int) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def measured(server: Server, side: str, load: Load) -> dict[str, float]:
    """Figures of one side under the load, after a short one that is not counted."""
    names = load.names if side == "ours" else ("default_model",)
    warm = Load(load.num_streams, min(5.0, load.seconds / 4), load.max_tokens, names)
    asyncio.run(under(server, warm, seed=1))
    tally = asyncio.run(under(server, Load(load.num_streams, load.seconds, load.max_tokens, names), seed=2))
    return figures(tally, load.seconds)


def mixed_ratio(server: Server, load: Load, names: Sequence[str]) -> dict[str, float]:
    """Tokens per second with several adapters over those with one, nobody leaving; in turn, twice."""
    rates: dict[str, list[float]] = {"single": [], "mixed": []}
    seconds = max(load.seconds / 6, 2.0)
    for turn in range(2):
        for kind in ("single", "mixed") if turn == 0 else ("mixed", "single"):
            chosen = tuple(names) if kind == "mixed" else load.names
            tally = asyncio.run(
                under(server, Load(load.num_streams, seconds, load.max_tokens, chosen, 0.0), seed=3 + turn)
            )
            rates[kind].append(tally.num_tokens / seconds)
    single, mixed = (statistics.mean(rates[kind]) for kind in ("single", "mixed"))
    return {"single": single, "mixed": mixed, "ratio": mixed / single if single else 0.0}


def figures(tally: Tally, seconds: float) -> dict[str, float]:
    """The numbers of a run."""
    first = sorted(tally.first_seconds) or [0.0]
    thirds = [
        statistics.median([size for at, size in tally.memory if low <= at / seconds < high] or [1])
        for low, high in ((0.25, 0.5), (0.75, 1.01))
    ]
    return {
        "tokens_per_second": tally.num_tokens / seconds,
        "first_token_seconds": statistics.median(first),
        "first_token_seconds_p95": first[int(len(first) * 0.95) - 1],
        "answers": tally.num_whole,
        "left": tally.num_left,
        "lost": len(tally.lost),
        "memory_mib": thirds[1] / 1024**2,
        "memory_ratio": thirds[1] / thirds[0],
    }


async def under(server: Server, load: Load, *, seed: int) -> Tally:
    """Keep the streams open for so long; answers that are on their way at the end do not count."""
    tally, end = Tally(), time.perf_counter() + load.seconds
    clients = [asyncio.create_task(client(server, load, random.Random(seed * 1000 + i), tally, end))
               for i in range(load.num_streams)]  # fmt: skip
    sampler = asyncio.create_task(sample(server, tally))
    await asyncio.gather(*clients)
    sampler.cancel()
    return tally


async def sample(server: Server, tally: Tally) -> None:
    """The process's memory, again and again."""
    started = time.perf_counter()
    while True:
        tally.memory.append((time.perf_counter() - started, server.process.memory_info().rss))
        await asyncio.sleep(SAMPLE_SECONDS)


async def client(server: Server, load: Load, draw: random.Random, tally: Tally, end: float) -> None:
    """One stream after the other, until the end."""
    while time.perf_counter() < end:
        words = " ".join(draw.choices(WORDS, k=draw.randint(4, 24)))
        leaves_after = draw.randint(1, load.max_tokens - 1) if draw.random() < load.leaves else None
        body = {
            "model": draw.choice(load.names),
            "messages": [{"role": "user", "content": words}],
            "max_tokens": load.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            await stream(server.port, body, leaves_after, tally, end)
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            tally.lost.append(f"{type(error).__name__}: {error}")


async def stream(port: int, body: dict[str, Any], leaves_after: int | None, tally: Tally, end: float) -> None:
    """Ask, read to the end or leave before it; count."""
    started, first, num_chunks, num_tokens, reason = time.perf_counter(), None, 0, None, None
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        content = json.dumps(body).encode()
        head = (f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n")  # fmt: skip
        writer.write(head.encode() + content)
        status = (await reader.readline()).split()
        if status[1:2] != [b"200"]:
            raise ValueError(f"status {status}")
        while line := await reader.readline():
            if time.perf_counter() >= end:
                return
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                break
            chunk = json.loads(line[6:])
            num_tokens = (chunk.get("usage") or {}).get("completion_tokens", num_tokens)
            for choice in chunk.get("choices", ()):
                reason = choice.get("finish_reason") or reason
                num_chunks += 1
                if first is None and choice.get("delta", {}).get("content"):
                    first = time.perf_counter() - started
                    tally.first_seconds.append(first)
            if leaves_after is not None and num_chunks > leaves_after:
                tally.num_left += 1
                return
        else:
            raise ValueError("the stream ended without [DONE]")
        if reason is None or num_tokens is None or (reason == "length" and num_tokens != body["max_tokens"]):
            raise ValueError(f"not whole: {reason}, {num_tokens} tokens")
        tally.num_whole += 1
        tally.num_tokens += num_tokens
    finally:
        writer.close()


if __name__ == "__main__":
    typer.run(main)
