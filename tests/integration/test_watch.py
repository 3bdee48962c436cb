"""A run and its watcher, as two processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_qlora.training.watching import look_at_process, look_at_run

ROOT = Path(__file__).parents[2]
DEMO = ["--config", "data/demo/run.yaml", "--set", "training.max_steps=60"]


def start(*arguments):
    command = [sys.executable, "-m", "mlx_qlora", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_a_watcher_sees_a_run_begin_be_killed_go_on_and_finish(tmp_path):
    folder = tmp_path / "adapter"
    watcher = start("watch", folder)
    assert "nothing there yet" in watcher.stdout.readline()
    run = start("train", *DEMO, "--adapter-path", folder)
    deadline = time.monotonic() + 120
    while look_at_run(folder).step < 25 and time.monotonic() < deadline:
        assert run.poll() is None, run.stdout.read()
        time.sleep(0.1)
    assert look_at_run(folder).state == "running"
    assert look_at_process(folder).pid == run.pid
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    told, _ = watcher.communicate(timeout=60)
    assert watcher.returncode == 1
    assert f"its process ({run.pid}) is gone" in told
    assert f"Run: mlx-qlora train --resume --adapter-path {folder}" in told

    watcher = start("watch", folder)
    assert "waiting for it to go on" in watcher.stdout.readline()
    again = start("train", "--resume", "--adapter-path", folder)
    told, _ = watcher.communicate(timeout=120)
    assert watcher.returncode == 0
    assert "finished" in told
    again.communicate(timeout=60)
    seen = look_at_run(folder)
    assert (seen.state, seen.step, len(seen.losses)) == ("finished", 60, 60)
    assert look_at_process(folder).outcome == "finished"
