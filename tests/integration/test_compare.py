"""`mlx-qlora compare`: real schemes, real processes, and what is left of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mlx_qlora.__main__ import load_command, run
from tests.checkpoints import make_checkpoint

ROWS = [{"prompt": f"quem venceu {i}?", "completion": "o clube venceu a partida"} for i in range(5)]
WORKER = "mlx_qlora.inference.comparison_worker"


@pytest.fixture(scope="module")
def folder(tiny_llama_folder, tmp_path_factory):
    """A model whose layers all have 64 inputs: groups of 128 fit none."""
    path = tmp_path_factory.mktemp("narrow") / "model"
    return make_checkpoint(path, "llama-tied", tiny_llama_folder, intermediate_size=64)


@pytest.fixture
def data(tmp_path):
    return written(tmp_path / "data.jsonl", ROWS)


def written(file, rows):
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return file


def compared(capsys, *options):
    code = run(load_command("compare"), ["--json", "--generated-tokens", "8", *map(str, options)])
    said = capsys.readouterr()
    return code, json.loads(said.out) if said.out else None, said.err


def test_formats_are_measured_side_by_side_and_one_that_fails_does_not_stop_the_others(
    folder, data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("MLX_QLORA_CACHE", str(tmp_path / "cache"))
    code, found, progress = compared(
        capsys, "--model", folder, "--data", data, "--schemes", "int4-g128,int8,int3",
        "--max-questions", 2, "--figure", tmp_path / "figure.png",
    )  # fmt: skip
    assert code == 0
    names = [row["scheme"] for row in found["rows"]]
    assert names == ["none", "int4-g128", "int8", "int3"]  # the float model was not asked for, and is needed
    reference, failed, int8, int3 = found["rows"]
    assert "no multiple of the group of 128" in failed["problem"]
    assert failed["perplexity"] is None
    assert reference["bits_per_weight"] == 16
    assert reference["stored_as"] == "bfloat16"
    assert 8.5 < int8["bits_per_weight"] < 8.6
    assert reference["bytes_on_disk"] > int8["bytes_on_disk"] > int3["bytes_on_disk"]
    assert 0 < int8["divergence_nats"] < int3["divergence_nats"]
    assert int8["agreement"] >= int3["agreement"]
    assert int8["num_questions"] == 2
    assert int8["exact_match"] == 0
    for row in (reference, int8, int3):
        assert row["target_tokens"] == reference["target_tokens"] > 0
        assert row["num_rows"] == 5
        assert row["tokens_per_second"] > 0
        assert row["peak_footprint_bytes"] > row["mlx_peak_bytes"] > 0
    assert "int8: scoring 5 rows" in progress
    assert (tmp_path / "figure.png").is_file()
    assert list((tmp_path / "cache").iterdir()) == []  # its copies are gone again


def test_when_no_scheme_can_be_measured_it_is_the_users_mistake_and_the_reasons_are_printed(
    folder, data, capsys
):
    code, found, err = compared(
        capsys, "--model", folder, "--data", data, "--schemes", "int4-g128", "--max-questions", 0
    )
    assert code == 2
    assert "no multiple of the group of 128" in found["rows"][1]["problem"]
    assert found["rows"][0]["exact_match"] is None
    assert "None of these schemes" in err


def test_what_is_wrong_with_the_data_is_said_by_the_worker_as_any_command_says_it(folder, tmp_path, capsys):
    broken = written(tmp_path / "broken.jsonl", [{"x": 1}])
    code, found, err = compared(capsys, "--model", folder, "--data", broken, "--schemes", "int8")
    assert (code, found) == (2, None)
    assert "columns" in err
    assert "Traceback" not in err
    code, found, err = compared(
        capsys, "--model", folder, "--data", written(tmp_path / "good.jsonl", ROWS),
        "--schemes", "int8", "--split", "test",
    )  # fmt: skip
    assert (code, found) == (2, None)
    assert "no test rows" in err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_measuring_process_ends_with_the_command(number, folder, data, tmp_path):
    script = (
        "import sys; from mlx_qlora.__main__ import load_command, run; "
        "sys.exit(run(load_command('compare'), sys.argv[1:]))"
    )
    arguments = ["--model", folder, "--data", data, "--schemes", "none"]
    command = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments), "--generated-tokens", "100000"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "MLX_QLORA_CACHE": str(tmp_path / "cache")},
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in command.stderr:
        if "generating" in line:
            break
    (worker,) = [p for p in psutil.Process(command.pid).children() if WORKER in " ".join(p.cmdline())]
    command.send_signal(number)
    command.wait(timeout=60)
    command.stderr.close()
    give_up = time.monotonic() + 30
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE and time.monotonic() < give_up:
        time.sleep(0.05)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    left = list((tmp_path / "cache").glob(".compare-*"))
    assert len(left) == (1 if number == signal.SIGKILL else 0)  # swept by the next comparison
