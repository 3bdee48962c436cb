"""`mlx-qlora compare-training`: real runs in real processes, kept, and gone on with."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from mlx_qlora.__main__ import load_command, run
from tests.checkpoints import make_checkpoint

ROWS = [{"prompt": f"quem venceu {i}?", "completion": "o clube venceu a partida"} for i in range(12)]
WORKER = "mlx_qlora.studies.training_worker"


@pytest.fixture(scope="module")
def folder(tiny_llama_folder, tmp_path_factory):
    """A model whose layers all have 64 inputs: groups of 128 fit none."""
    path = tmp_path_factory.mktemp("narrow") / "model"
    return make_checkpoint(path, "llama-tied", tiny_llama_folder, intermediate_size=64)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in (("train", ROWS[:8]), ("valid", ROWS[8:10]), ("test", ROWS[10:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def options(folder, data, output, *more):
    return [*map(str, ("--model", folder, "--data", data, "--output", output, "--preset", "mac-8gb")),
            "--generated-tokens", "8", "--max-questions", "1", *more]  # fmt: skip


def compared(capsys, *arguments):
    code = run(load_command("compare-training"), ["--json", *arguments])
    said = capsys.readouterr()
    return code, json.loads(said.out) if said.out else None, said.err


def check(row, output, num_steps):
    """One row with one run: what was measured fits together, and with what is on disk."""
    (measured,) = row["runs"]
    training, answers = measured["training"], measured["answers"]
    assert training["num_steps"] == num_steps
    assert training["tokens"] > 0 < training["tokens_per_second"]
    assert training["seconds"] > training["seconds_per_step"] > 0
    assert training["peak_footprint_bytes"] > training["mlx_peak_bytes"] > row["base"]["bytes_in_memory"]
    adapter = output / measured["folder"] / "adapter" / "adapters.safetensors"
    assert training["adapter_bytes"] == adapter.stat().st_size
    assert training["curve"][0][0] == 0
    assert training["val_loss_nats"] == min(loss for _, loss in training["curve"])
    assert (answers["split"], answers["num_rows"], answers["num_questions"]) == ("test", 2, 1)
    assert answers["tokens_per_second"] > 0


@pytest.mark.slow
def test_a_scheme_is_trained_and_asked_and_what_is_finished_is_kept(folder, data, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = options(folder, data, output, "--set", "training.max_steps=3", "--schemes", "int4")
    code, found, progress = compared(capsys, *arguments)
    assert code == 0
    check(found["rows"][0], output, 3)
    assert "step 3/3" in progress
    assert (output / "comparison.png").is_file()
    assert json.loads((output / "comparison.json").read_text()) == found
    assert [path.name for path in output.glob(".*")] == []
    code, again, progress = compared(capsys, *arguments)
    assert code == 0
    assert again["rows"] == found["rows"]
    assert "step" not in progress
    assert "int4, seed 0: kept from before" in progress


@pytest.mark.slow
def test_lora_and_qlora_are_measured_side_by_side_and_one_that_fails_does_not_stop_the_others(
    folder, data, tmp_path, capsys
):
    output = tmp_path / "out"
    arguments = options(folder, data, output, "--set", "training.max_steps=2")
    code, found, _ = compared(capsys, *arguments, "--schemes", "none,int4-g128,int4")
    assert code == 0
    lora, failed, qlora = found["rows"]
    assert "no multiple of the group of 128" in failed["problems"][0]
    assert failed["runs"] == []
    for row in (lora, qlora):
        check(row, output, 2)
    assert lora["base"]["bytes_on_disk"] > qlora["base"]["bytes_on_disk"]
    assert lora["base"]["bytes_in_memory"] > qlora["base"]["bytes_in_memory"]
    assert lora["runs"][0]["training"]["train_loss_nats"] != qlora["runs"][0]["training"]["train_loss_nats"]


@pytest.mark.slow
def test_rows_that_cannot_be_used_are_told_once_and_when_nothing_fits_it_is_the_users_mistake(
    folder, data, tmp_path, capsys
):
    arguments = options(folder, data, tmp_path / "out", "--schemes", "int4-g128")
    code, found, err = compared(capsys, *arguments)
    assert code == 2
    assert found["rows"][0]["runs"] == []
    assert "None of these could be trained" in err
    (data / "train.jsonl").write_text('{"x": 1}\n')
    code, found, err = compared(capsys, *options(folder, data, tmp_path / "out", "--schemes", "none,int4"))
    assert (code, found) == (2, None)
    assert "columns" in err
    assert "Traceback" not in err
    assert run(load_command("compare-training"), [*arguments, "--seeds", "0,x"]) == 2


@pytest.mark.slow
@pytest.mark.long
def test_stopped_it_ends_with_its_processes_and_goes_on_where_it_was(folder, data, tmp_path, capsys):
    script = (
        "import sys; from mlx_qlora.__main__ import load_command, run; "
        "sys.exit(run(load_command('compare-training'), sys.argv[1:]))"
    )
    arguments = options(
        folder, data, tmp_path / "out", "--schemes", "none", "--set", "training.max_steps=1500",
        "--set", "training.steps_per_report=1", "--set", "training.steps_per_validation=1500",
    )  # fmt: skip
    command = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=Path(__file__).parents[2],
        env=os.environ,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in command.stderr:
        if line.startswith("step 5/"):
            break
    (worker,) = [p for p in psutil.Process(command.pid).children() if WORKER in " ".join(p.cmdline())]
    command.send_signal(signal.SIGINT)
    _, rest = command.communicate(timeout=60)
    assert command.returncode == 130
    assert "0 of 1 runs are finished" in rest
    assert not psutil.pid_exists(worker.pid)
    assert [path.name for path in (tmp_path / "out").glob(".*")] == []
    code, found, _ = compared(capsys, *arguments)
    assert code == 0
    training = found["rows"][0]["runs"][0]["training"]
    assert training["was_resumed"]
    assert training["num_steps"] == 1500
