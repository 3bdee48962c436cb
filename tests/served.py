"""A model folder with adapters, and `mlx-qlora serve` on it as a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import mlx.core as mx

from mlx_qlora.config import LoraConfig, ModelConfig, QuantizationConfig
from mlx_qlora.dataset import ensure_chat_template
from mlx_qlora.lora.adapter import AdapterInfo, adapter_tensors, save_adapter, text_sha256
from mlx_qlora.lora.attach import attach
from mlx_qlora.weights.loader import load_base

REPOSITORY = Path(__file__).parents[1]
COMMAND = (
    "import sys; from mlx_qlora.__main__ import load_command, run; "
    "sys.exit(run(load_command('serve'), sys.argv[1:]))"
)


def save_random_adapter(model: Path, folder: Path, *, seed: int) -> Path:
    """An adapter of that base which changes its answers, without a training."""
    base = load_base(ModelConfig(path=str(model)), QuantizationConfig(scheme="none"))
    template = ensure_chat_template(base.tokenizer)
    lora = LoraConfig(rank=4)
    attach(base.model, lora, seed)
    tensors = {
        name: mx.random.normal(array.shape, key=mx.random.key(seed + index)) * 0.3
        for index, (name, array) in enumerate(sorted(adapter_tensors(base.model).items()))
    }
    info = AdapterInfo(
        model=ModelConfig(path=str(model)),
        quantization=QuantizationConfig(scheme="none"),
        lora=lora,
        fingerprint=base.fingerprint,
        chat_template=template,
        chat_template_sha256=text_sha256(template),
    )
    save_adapter(folder, tensors, info, len(base.model.layers))
    return folder


@dataclass
class Served:
    """A running server."""

    process: subprocess.Popen[str]
    url: str
    ready: str
    """The line it printed."""
    log: list[str] = field(default_factory=list)
    """What it wrote to stderr, as it comes."""
    key: str | None = None

    def client(self, **options: object) -> httpx.Client:
        """An HTTP client of it."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(
            base_url=self.url, headers=headers, timeout=60, trust_env=False, verify=False, **options
        )

    @property
    def port(self) -> int:
        """Of the socket."""
        return int(self.url.rpartition(":")[2])

    def logged(self, text: str, seconds: float = 10) -> str:
        """The whole log, as soon as `text` is in it; lines come a moment after responses."""
        until = time.monotonic() + seconds
        while text not in (log := "".join(self.log)):
            assert time.monotonic() < until, f"{text!r} is not in the log:\n{log}"
            time.sleep(0.01)
        return log

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(30)


@contextlib.contextmanager
def serving(
    model: Path, *options: object, key: str | None = None, command: list[str] | None = None
) -> Iterator[Served]:
    """A server on a free port; killed at the end if it still runs."""
    start = command or [sys.executable, "-c", COMMAND]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("MLX_QLORA_API_KEY", None)
    if key:
        environment["MLX_QLORA_API_KEY"] = key
    process = subprocess.Popen(
        [*start, "--model", str(model), "--port", "0", *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=environment,
    )
    log: list[str] = []
    reader = threading.Thread(target=_read, args=(process, log), daemon=True)
    try:
        reader.start()
        assert process.stdout is not None
        ready = process.stdout.readline()
        found = re.search(r"http://\S+", ready)
        if not found:
            process.wait(30)
            reader.join(5)
            raise AssertionError("the server did not start:\n" + "".join(log))
        yield Served(process, found[0], ready.rstrip("\n"), log, key)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)
        reader.join(5)
        assert process.stdout is not None
        process.stdout.close()


def _read(process: subprocess.Popen[str], log: list[str]) -> None:
    assert process.stderr is not None
    with process.stderr:
        log.extend(iter(process.stderr.readline, ""))


def chat(model: str = "base", content: str = "oi", **more: object) -> dict[str, object]:
    """The body of a small good request."""
    messages = [{"role": "user", "content": content}]
    return {"model": model, "messages": messages, "max_tokens": 8, **more}
