"""What a real run leaves to read: its report, what that suggests, and what trackers were sent."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mlx_qlora.config import build_config
from mlx_qlora.training.metrics import events_named, read_metrics
from mlx_qlora.training.run import TrainedRun, train

DEMO = Path(__file__).parents[2] / "data" / "demo"
"""A small model that has learnt a little Portuguese."""
CLI = [sys.executable, "-m", "mlx_qlora"]
WORDS = ["o", "clube", "venceu", "a", "partida", "no", "estádio", "com", "dois", "gols", "em", "casa"]


def write_rows(folder: Path, *, train_rows: int, valid_rows: int, words: int = 5, same: bool = False) -> Path:
    """Rows whose answers are chance, so that there is nothing to learn but the rows themselves."""
    rng = random.Random(7)
    folder.mkdir()
    for name, count in (("train", train_rows), ("valid", valid_rows)):
        rows = [
            {
                "prompt": f"{' '.join(rng.choices(WORDS, k=words))} {name}{at}?",
                "completion": "casa" if same else " ".join(rng.choices(WORDS, k=3)),
            }
            for at in range(count)
        ]
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (folder / f"{name}.jsonl").write_text(text + "\n" if rows else "", encoding="utf-8")
    return folder


def run(model: Path, data: Path, adapter: Path, **training) -> TrainedRun:
    defaults = {"warmup_steps": 2, "batch_size": 4, "gradient_accumulation": 1, "report_samples": 0}
    config = build_config(
        {
            "model": {"path": str(model)},
            "data": {"path": str(data), "max_seq_length": 96},
            "training": {**defaults, **training},
        }
    )
    return train(config, adapter)


def topics(trained: TrainedRun) -> dict[str, str]:
    return {said.topic: said.line for said in trained.suggestions}


@pytest.mark.slow
def test_a_run_that_learns_its_rows_by_heart_is_told_where_overfitting_began(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name, rows in (("train", slice(0, 150, 19)), ("valid", slice(10))):
        lines = (DEMO / "club" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        (data / f"{name}.jsonl").write_text("\n".join(lines[rows]) + "\n", encoding="utf-8")
    trained = run(
        DEMO / "model", data, tmp_path / "a", learning_rate=0.005, batch_size=8, max_steps=21,
        steps_per_validation=3, lr_schedule="constant",
    )  # fmt: skip
    best = trained.finished.best_step
    assert 0 < best < 12
    assert re.fullmatch(
        rf"overfitting from epoch {best}: validation rose \d\.\d\d while the training loss fell \d\.\d\d; "
        rf"best is step {best}, which is the one kept: --set training\.early_stopping_patience=2",
        topics(trained)["overfitting"],
    )


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "is_told"), [(3.0, True), (0.003, False)])
def test_a_rate_that_is_far_too_high_is_told_and_a_thousandth_of_it_is_not(rate, is_told, tmp_path):
    """The embedded model has something to lose."""
    trained = run(DEMO / "model", DEMO / "club", tmp_path / "a", learning_rate=rate, max_steps=16)
    if not is_told:
        assert "learning rate" not in topics(trained)
        return
    said = topics(trained)["learning rate"]
    # Such a run is chaotic: another order of additions, and its first updates are as bad as its last.
    rise = re.search(r"rose from (\d+\.\d\d)(?:, the base's,)? to (\d+\.\d\d)", said)
    assert float(rise[2]) > float(rise[1]) + 0.1
    assert "--set training.learning_rate=6.0e-01" in said
    assert "overfitting" not in topics(trained), "that would set the same key"


@pytest.mark.slow
def test_padding_is_told_as_it_was_measured_and_packing_then_takes_fewer_positions(
    tiny_llama_folder, tmp_path
):
    data = write_rows(tmp_path / "data", train_rows=40, valid_rows=4, words=1)
    padded = run(tiny_llama_folder, data, tmp_path / "a", batch_size=1, num_epochs=1)
    said = topics(padded)["padding"]
    assert said.endswith("--set data.packing=true")
    config = build_config(
        {
            "model": {"path": str(tiny_llama_folder)},
            "data": {"path": str(data), "max_seq_length": 96, "packing": True},
            "training": {"batch_size": 1, "gradient_accumulation": 1, "num_epochs": 1, "report_samples": 0},
        }
    )
    packed = train(config, tmp_path / "b")
    assert "padding" not in topics(packed)
    positions = [
        sum(
            step["positions"]
            for step in events_named(read_metrics(tmp_path / name / "metrics.jsonl"), "StepDone")
        )
        for name in ("a", "b")
    ]
    modelled = float(re.search(r"([\d.]+)× cheaper", said).group(1))
    # The tiny model's attention is a small part: cost is close to positions.
    assert positions[0] / positions[1] == pytest.approx(modelled, rel=0.2)


def test_a_run_without_validation_is_told_so_and_has_no_answers(tiny_llama_folder, tmp_path):
    data = write_rows(tmp_path / "data", train_rows=8, valid_rows=0)
    (data / "valid.jsonl").unlink()
    config = build_config(
        {
            "model": {"path": str(tiny_llama_folder)},
            "data": {"path": str(data), "valid_fraction": 0.0},
            "training": {"max_steps": 2},
        }
    )
    trained = train(config, tmp_path / "a")
    assert "--set data.valid_fraction=0.1" in topics(trained)["validation"]
    assert json.loads((tmp_path / "a" / "report.json").read_text())["samples"] == []


@pytest.mark.slow
def test_the_command_prints_and_returns_what_the_report_suggests(tiny_llama_folder, tmp_path):
    data = write_rows(tmp_path / "data", train_rows=12, valid_rows=2, words=1)
    adapter = tmp_path / "my club"
    command = [
        *CLI, "train", "--model", str(tiny_llama_folder), "--data", str(data), "--adapter-path", str(adapter),
        "--set", "training.max_steps=4", "--set", "training.batch_size=1", "--set", "lora.variant=dora",
        "--set", "training.gradient_accumulation=1", "--set", "training.report_samples=1",
    ]  # fmt: skip
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    (said,) = [said for said in result["suggestions"] if said["topic"] == "padding"]
    assert said["options"] == "--set data.packing=true"
    for name in ("report.md", "report.html"):
        text = (adapter / name).read_text(encoding="utf-8")
        assert said["options"] in text
        assert "A rank-8 DoRA adapter" in text
    page = (adapter / "report.html").read_text(encoding="utf-8")
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    assert root.find(".//figure") is not None
    sample = json.loads((adapter / "report.json").read_text())["samples"][0]
    assert sample["source"] == "valid.jsonl:1"
    assert sample["expected"] in page
    # The suggested command is one that can be typed.
    again = re.search(r"mlx-qlora (train --config .*)", (adapter / "report.md").read_text()).group(1)
    repeated = subprocess.run([*CLI, *shlex.split(again)], capture_output=True, text=True)
    assert repeated.returncode == 0, repeated.stderr
    assert (tmp_path / "my club-2" / "report.html").exists()


@pytest.mark.slow
def test_answers_and_trackers_leave_the_adapter_as_it_would_have_been(tiny_llama_folder, tmp_path):
    pytest.importorskip("tensorboard")
    data = write_rows(tmp_path / "data", train_rows=16, valid_rows=4)
    options = {"max_steps": 6, "learning_rate": 0.01, "steps_per_validation": 2}
    run(tiny_llama_folder, data, tmp_path / "a", **options)
    told = run(tiny_llama_folder, data, tmp_path / "b", **options, report_samples=3, trackers=["tensorboard"])
    names = ("adapters.safetensors", "adapter_config.json")
    assert [(tmp_path / "a" / n).read_bytes() for n in names] == [
        (tmp_path / "b" / n).read_bytes() for n in names
    ]
    assert len(json.loads((tmp_path / "b" / "report.json").read_text())["samples"]) == 3
    assert not told.base.model.training


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    return [
        (event.step, value.tag, value.tensor.float_val[0])
        for path in sorted(folder.iterdir())
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
    ]


def check_scalars(adapter: Path) -> None:
    """TensorBoard has each update's loss once, as metrics.jsonl has it."""
    found = [
        (step, value) for step, tag, value in scalars(adapter / "tensorboard") if tag == "train/loss_nats"
    ]
    logged = events_named(read_metrics(adapter / "metrics.jsonl"), "StepDone")
    assert [step for step, _ in found] == [entry["step"] for entry in logged]
    assert [value for _, value in found] == pytest.approx([entry["loss_nats"] for entry in logged], rel=1e-6)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_is_in_the_tracker_once(tiny_llama_folder, tmp_path):
    pytest.importorskip("tensorboard")
    data, adapter = write_rows(tmp_path / "data", train_rows=40, valid_rows=4), tmp_path / "a"
    settings = {
        "training.max_steps": 24, "training.steps_per_checkpoint": 3, "training.steps_per_validation": 7,
        "training.trackers": "[tensorboard]", "training.report_samples": 0,
    }  # fmt: skip
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = [
        *CLI, "train", "--model", str(tiny_llama_folder), "--data", str(data), "--adapter-path", str(adapter),
        *sets,
    ]  # fmt: skip
    for steps in (5, 13):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ
        )
        until = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until:
            if len(events_named(read_metrics(adapter / "metrics.jsonl"), "StepDone")) >= steps:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        process.wait()
        command = [*CLI, "train", "--resume", "--adapter-path", str(adapter)]
    subprocess.run(command, check=True, capture_output=True)
    check_scalars(adapter)


@pytest.mark.slow
def test_of_several_ranks_the_first_alone_writes_the_report_and_tells_the_tracker(
    tiny_llama_folder, tmp_path
):
    pytest.importorskip("tensorboard")
    data, adapter = write_rows(tmp_path / "data", train_rows=16, valid_rows=4), tmp_path / "a"
    command = [
        *CLI, "train", "--model", str(tiny_llama_folder), "--data", str(data), "--adapter-path", str(adapter),
        "--processes", "2", "--json", "--set", "training.max_steps=4",
        "--set", "training.trackers=[tensorboard]",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["suggestions"] == json.loads((adapter / "report.json").read_text())["suggestions"]
    assert len(list((adapter / "tensorboard").iterdir())) == 1
    check_scalars(adapter)
    assert (adapter / "report.html").exists()
