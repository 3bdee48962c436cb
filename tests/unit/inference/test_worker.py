"""inference/worker.py"""

import os
import signal

import pytest

from mlx_qlora.errors import Interrupted, MemoryBudgetError, ModelError
from mlx_qlora.inference.worker import ask

WORKER = """
import os, sys
from mlx_qlora.errors import Interrupted, MemoryBudgetError
from mlx_qlora.inference.worker import work

def do(task, tell):
    print("what a library prints")
    for phase in task.get("phases", ()):
        tell("phase", phase)
    kind = task["do"]
    if kind == "refuse":
        raise MemoryBudgetError("too large", where="here", run="a smaller one")
    if kind == "stop":
        raise Interrupted("stopped", signal_number=15, run="again")
    if kind == "crash":
        raise ValueError("no such thing")
    if kind == "die":
        os.kill(os.getpid(), 9)
    return {"twice": 2 * task["number"], "nothing": float("nan")}

if __name__ == "__main__":
    work(do)
"""


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Ask a worker for something; what it said on its way stands in `asked.said`."""
    (tmp_path / "a_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def ask_it(**task):
        return ask("a_worker", task, tmp_path / "log", lambda *said: ask_it.said.append(said), where="there")

    ask_it.said = []
    return ask_it


def test_a_worker_gives_a_result_after_what_it_says_and_prints_are_none_of_it(asked, tmp_path):
    assert asked(do="double", number=21, phases=["one", "two"]) == {"twice": 42, "nothing": None}
    assert asked.said == [("phase", "one"), ("phase", "two")]
    assert "what a library prints" in (tmp_path / "log").read_text()


def test_its_error_comes_back_as_it_was_raised(asked):
    with pytest.raises(MemoryBudgetError) as caught:
        asked(do="refuse")
    assert (caught.value.what, caught.value.where, caught.value.run) == ("too large", "here", "a smaller one")
    with pytest.raises(Interrupted) as stopped:
        asked(do="stop")
    assert stopped.value.exit_code == 128 + signal.SIGTERM


def test_a_crash_shows_its_last_line_and_a_kill_is_said_to_be_one(asked):
    with pytest.raises(ModelError, match="exit code 1") as crashed:
        asked(do="crash")
    assert "ValueError: no such thing" in crashed.value.what
    assert crashed.value.where == "there"
    with pytest.raises(ModelError, match="memory ran out"):
        asked(do="die")


def test_no_worker_is_left_and_the_environment_is_as_it_was(asked):
    before = dict(os.environ)
    asked(do="double", number=1)
    assert dict(os.environ) == before
