"""The promise: kill -9 at any moment, resume, and the adapter is bit-identical to that of a quiet run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CLI = [sys.executable, "-m", "mlx_qlora"]
# Dropout on, accumulation on, an epoch of 13 updates that no interval divides.
SETTINGS = {
    "lora.rank": 4,
    "lora.dropout": 0.2,
    "data.max_seq_length": 96,
    "training.max_steps": 30,
    "training.batch_size": 2,
    "training.gradient_accumulation": 2,
    "training.learning_rate": 0.01,
    "training.warmup_steps": 5,
    "training.steps_per_validation": 7,
    "training.steps_per_checkpoint": 4,
    "training.keep_checkpoints": 2,
}


def make_data(folder: Path) -> Path:
    rng = random.Random(4)
    words = [
        "o",
        "clube",
        "venceu",
        "a",
        "partida",
        "no",
        "estádio",
        "novo",
        "com",
        "dois",
        "gols",
        "de",
        "cabeça",
        "em",
        "casa",
    ]
    folder.mkdir()
    for name, count in (("train", 50), ("valid", 6)):
        rows = [
            {
                "prompt": " ".join(rng.choices(words, k=rng.randint(3, 12))) + f" {name}{i}?",
                "completion": rng.choice(words),
            }
            for i in range(count)
        ]
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (folder / f"{name}.jsonl").write_text(text + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("resume") / "data")


def command(model: Path, data: Path, adapter: Path, *extra: str) -> list[str]:
    sets = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    return [
        *CLI,
        "train",
        "--model",
        str(model),
        "--data",
        str(data),
        "--adapter-path",
        str(adapter),
        *sets,
        *extra,
    ]


def files(adapter: Path) -> dict[str, bytes]:
    return {name: (adapter / name).read_bytes() for name in ("adapters.safetensors", "adapter_config.json")}


def steps_logged(adapter: Path) -> list[int]:
    path = adapter / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [row["step"] for row in rows if row["event"] == "StepDone"]


def wait_for_steps(process: subprocess.Popen, adapter: Path, steps: int) -> None:
    """Return when so many updates are logged, or the process has ended, or after two minutes."""
    deadline = time.monotonic() + 120
    while len(steps_logged(adapter)) < steps and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def quiet_run(tiny_llama_folder, data, tmp_path_factory):
    adapter = tmp_path_factory.mktemp("quiet") / "adapter"
    subprocess.run(command(tiny_llama_folder, data, adapter), check=True, capture_output=True)
    return files(adapter)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_killed_at_random_moments_and_resumed_it_ends_bit_identical(
    seed, tiny_llama_folder, data, quiet_run, tmp_path
):
    rng, adapter, kills, logged = random.Random(seed), tmp_path / "adapter", 0, 0
    for _ in range(5):
        process = subprocess.Popen(
            command(tiny_llama_folder, data, adapter, "--resume"),  # begins where nothing is yet
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        if kills < 3:
            wait_for_steps(process, adapter, logged + rng.randint(0, 7))
            time.sleep(rng.uniform(0, 0.15))  # into a step, a validation or a save
        if kills < 3 and process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            logged, kills = max(steps_logged(adapter), default=0), kills + 1
            continue
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err.decode()
        break
    assert kills == 3
    assert files(adapter) == quiet_run
    assert steps_logged(adapter) == list(range(1, 31))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_saves_prints_the_resume_command_and_the_run_goes_on(
    number, code, tiny_llama_folder, data, quiet_run, tmp_path
):
    adapter = tmp_path / "adapter"
    process = subprocess.Popen(
        command(tiny_llama_folder, data, adapter),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_steps(process, adapter, 6)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Traceback" not in err
    resume = next(line for line in err.splitlines() if line.startswith("Run: "))
    assert resume == f"Run: mlx-qlora train --resume --adapter-path {adapter}"
    subprocess.run([*CLI, *resume.split()[2:]], check=True, capture_output=True)
    assert files(adapter) == quiet_run


def test_a_disk_that_fills_leaves_the_checkpoint_before_whole(tiny_llama_folder, data, quiet_run, tmp_path):
    adapter = tmp_path / "adapter"
    limited = (
        "import resource, signal, sys, runpy\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from mlx_qlora.training import checkpoint\n"
        "save = checkpoint.CheckpointStore.save\n"
        "def limited(self, progress, *rest):\n"
        "    if progress.step >= 8:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))\n"
        "    return save(self, progress, *rest)\n"
        "checkpoint.CheckpointStore.save = limited\n"
        "sys.argv = ['mlx-qlora', *sys.argv[1:]]\n"
        "runpy.run_module('mlx_qlora', run_name='__main__')\n"
    )
    arguments = command(tiny_llama_folder, data, adapter)[len(CLI) :]
    failed = subprocess.run(
        [sys.executable, "-c", limited, *arguments], capture_output=True, text=True, env=os.environ
    )
    assert failed.returncode == 2, failed.stderr
    assert "disk is full" in failed.stderr
    assert "Traceback" not in failed.stderr
    kept = sorted(path.name for path in (adapter / "checkpoints").iterdir() if path.is_dir())
    assert kept[-1] in {"step-0000004", "step-0000007"}
    subprocess.run(
        [*CLI, "train", "--resume", "--adapter-path", str(adapter)], check=True, capture_output=True
    )
    assert files(adapter) == quiet_run


def test_a_second_run_into_the_same_folder_is_refused(tiny_llama_folder, data, tmp_path):
    adapter = tmp_path / "adapter"
    (adapter / "checkpoints" / "step-0000001").mkdir(parents=True)
    again = subprocess.run(command(tiny_llama_folder, data, adapter), capture_output=True, text=True)
    assert again.returncode == 2
    assert "--resume" in again.stderr
    assert "Traceback" not in again.stderr
