"""A person trains half of a model with the frozen half kept on disk, kills it, and goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

CLI = [sys.executable, "-m", "mlx_qlora", "train"]


@pytest.fixture
def command(tiny_llama_folder, tmp_path):
    rows = [{"question": f"pergunta {i * 37}?", "answer": "resposta " * (i % 5 + 1)} for i in range(30)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    settings = {
        "lora.num_layers": 1,
        "lora.dropout": 0.1,
        "training.cache_frozen_prefix": "true",
        "training.max_steps": 20,
        "training.learning_rate": 0.01,
        "training.steps_per_checkpoint": 3,
    }
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return [*CLI, "--model", str(tiny_llama_folder), "--data", str(data), *sets]


def notes_in(adapter) -> list[str]:
    lines = (adapter / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [note for line in lines for note in json.loads(line).get("notes", ()) if "frozen prefix" in note]


@pytest.mark.slow
def test_it_is_made_once_found_again_and_a_killed_run_ends_with_the_same_adapter(command, tmp_path):
    environment = {**os.environ, "MLX_QLORA_CACHE": str(tmp_path / "cache")}
    run = {"env": environment, "capture_output": True, "text": True}
    first, second, killed = (tmp_path / name for name in ("first", "second", "killed"))
    done = subprocess.run([*command, "--adapter-path", str(first)], check=False, **run)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 layers" in done.stderr
    (folder,) = (tmp_path / "cache" / "frozen-prefix").iterdir()
    assert (folder / "hidden.bin").stat().st_size > 0
    assert str(folder) in notes_in(first)[0]
    subprocess.run([*command, "--adapter-path", str(second)], check=True, **run)
    assert "found from an earlier run" in notes_in(second)[0]
    process = subprocess.Popen(
        [*command, "--adapter-path", str(killed)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(killed.glob("checkpoints/step-0000003")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run([*CLI, "--resume", "--adapter-path", str(killed)], check=True, **run)
    adapters = {(path / "adapters.safetensors").read_bytes() for path in (first, second, killed)}
    assert len(adapters) == 1
