"""Two ranks in two network namespaces, over a link that is slow, loses packets, or is down for a while."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

REPOSITORY = Path(__file__).parents[2]


def benchmark(name):
    """A script of benchmarks/, as a module."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


slow_link = benchmark("slow_link")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="this MLX has no ring"),
    pytest.mark.skipif(slow_link.why_not() is not None, reason=str(slow_link.why_not())),
]

# The supervisor and rank 0 in one namespace, rank 1 in the other.
RUN = """
import json, os, signal, sys
from pathlib import Path
from mlx_qlora.config import build_config
from mlx_qlora.training.events import StepDone
from mlx_qlora.training.launcher import LocalLauncher, Place
from mlx_qlora.training.supervisor import train_on_ranks

given = json.loads(sys.argv[1])
here, there = given["addresses"]
prefix = ("ip", "netns", "exec", given["other"])
launcher = LocalLauncher(2, places=[Place("a", here), Place("b", there, prefix)])
notes, carrier = [], given["carrier"]

def cut(event):
    if carrier and not notes and isinstance(event, StepDone) and event.step == 4:
        os.kill(carrier, signal.SIGSTOP)

def note(text):
    notes.append(text)
    if carrier:
        os.kill(carrier, signal.SIGCONT)

train_on_ranks(build_config(given["config"]), given["adapter"], launcher, observers=[cut], on_note=note)
print(json.dumps(notes))
"""


@pytest.fixture(scope="module")
def config(tiny_llama_folder, tmp_path_factory):
    data = tmp_path_factory.mktemp("link") / "data"
    data.mkdir()
    rng = random.Random(1)
    rows = [{"prompt": "clube " * rng.randint(1, 9) + f"{i}?", "completion": "gol"} for i in range(9)]
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    training = {"max_steps": 8, "learning_rate": 0.01, "warmup_steps": 2, "steps_per_checkpoint": 3}
    return {
        "model": {"path": str(tiny_llama_folder)},
        "quantization": {"scheme": "int4"},
        "lora": {"rank": 4},
        "data": {"path": str(data), "max_seq_length": 96},
        "training": training,
    }


@pytest.fixture(scope="module")
def loopback(config, tmp_path_factory):
    from mlx_qlora.config import build_config
    from mlx_qlora.training.supervisor import train_on_ranks

    adapter = tmp_path_factory.mktemp("loopback") / "adapter"
    train_on_ranks(build_config(config), adapter, 2)
    return (adapter / "adapters.safetensors").read_bytes()


def over(link, config, adapter, *, is_cut=False):
    """The notes of a run over this link."""
    given = {
        "addresses": link.addresses,
        "other": link.namespaces[1],
        "carrier": link.carrier.pid if is_cut else None,
        "config": config,
        "adapter": str(adapter),
    }
    inside = ["ip", "netns", "exec", link.namespaces[0], sys.executable, "-c", RUN, json.dumps(given)]
    run = subprocess.run(inside, capture_output=True, text=True, cwd=REPOSITORY, env=os.environ)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_delay_and_loss_change_no_bit(config, loopback, tmp_path):
    with slow_link.slow_link(delay_seconds=0.02, loss=0.02) as link:
        assert over(link, config, tmp_path / "adapter") == []
    assert (tmp_path / "adapter" / "adapters.safetensors").read_bytes() == loopback


def test_a_link_that_goes_down_and_comes_back_costs_a_restart_and_no_bit(config, loopback, tmp_path):
    with slow_link.slow_link(delay_seconds=0.002) as link:
        try:
            notes = over(link, config, tmp_path / "adapter", is_cut=True)
        finally:
            os.kill(link.carrier.pid, signal.SIGCONT)
    assert len(notes) == 1
    assert "no sign of life" in notes[0] or "waited for each other" in notes[0]
    assert (tmp_path / "adapter" / "adapters.safetensors").read_bytes() == loopback
