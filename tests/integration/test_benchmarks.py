"""The benchmarks run, and notice when the sides did not do the same. Their figures are no test's business."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def loaded(name: str):
    """A benchmark's module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
    return module


def output_of(script: str, *options: str):
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--repetitions", "1", "--json", *options],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_step_benchmark_measures_both_sides_with_one_loss():
    sides = output_of("train_step.py", "--case", "tiny", "--side", "mlx_lm", "--side", "ours")["tiny"][
        "sides"
    ]
    for side in ("mlx_lm", "ours"):
        median = sides[side]["median"]
        assert median["tokens_per_second"] > 0
        assert 0 < median["act_bytes"] < median["process_peak_bytes"]
    ours, theirs = (sides[side]["median"]["loss_nats"] for side in ("ours", "mlx_lm"))
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert sides["mlx_lm"]["ratio"]["tokens_per_second"] == 1


def test_a_step_that_computes_another_loss_is_a_problem():
    train_step = loaded("train_step")

    def result(**losses):
        return {"sides": {side: {"median": {"loss_nats": loss}} for side, loss in losses.items()}}

    assert train_step._loss_problems("plain", result(mlx_lm=9.0, ours=9.0001)) == []
    assert train_step._loss_problems("plain", result(mlx_lm=9.0, ours=9.1))
    assert train_step._loss_problems("alpaca-lengths", result(mlx_lm=8.5, ours=8.4)) == []


@pytest.mark.parametrize("side", ["theirs", "ours+magic", "unsloth"])
def test_a_side_that_cannot_be_measured_is_refused(side):
    train_step = loaded("train_step")
    with pytest.raises(SystemExit, match="no side|--unsloth-python"):
        train_step._sides([side], has_unsloth=False)


def test_sides_take_turns_and_ratios_are_those_of_medians():
    pairing = loaded("pairing")
    order = []

    def measure(side):
        order.append(side)
        return {"seconds": {"mine": 1.0, "other": 4.0}[side] * len(order)}

    figures = pairing.in_turn(["other", "mine"], 3, measure)
    assert order == ["other", "mine", "mine", "other", "other", "mine"]
    assert [run["seconds"] for run in figures["mine"]] == [2.0, 3.0, 6.0]
    result = pairing.compared(figures, "other")
    assert result["mine"]["median"] == {"seconds": 3.0}
    assert result["mine"]["ratio"] == {"seconds": 3.0 / 16.0}


def test_a_process_is_measured_alone_and_its_failure_ends_the_benchmark():
    pairing = loaded("pairing")
    script = "import time; print('head', flush=True); time.sleep(0.3); print('x' * 3); b = bytearray({})"
    small, large = (
        pairing.finished([sys.executable, "-c", script.format(size)], heading="head\n")
        for size in (1, 1024 * 1024**2)
    )
    assert small.output == "head\nxxx\n"
    assert 0.3 < small.first_output_seconds <= small.seconds
    # A process begins with the pages of whoever starts it, and this one may hold hundreds of megabytes.
    assert small.peak_rss_bytes < 1024**3 < large.peak_rss_bytes < 1100 * 1024**2
    with pytest.raises(SystemExit, match="exit code 3"):
        pairing.finished([sys.executable, "-c", "import sys; sys.exit(3)"])


@pytest.mark.slow
def test_the_run_benchmark_trains_with_both():
    small = "--steps 1 --batch-size 2 --valid-batches 1 --hidden 64 --layers 1"
    result = output_of("train_run.py", *small.split())
    assert result["tokens"] > 0
    for side in result["sides"].values():
        assert side["median"]["val_loss_nats"] > 1
        assert side["median"]["seconds"] > 0


@pytest.mark.slow
def test_the_answer_benchmark_gets_one_text_from_both():
    result = output_of("infer.py", "--case", "short-prompt", "--max-tokens", "8")["short-prompt"]
    assert len(set(result["texts"].values())) == 1
    for side in result["sides"].values():
        assert side["median"]["generation_tokens"] == 8
        assert 0 < side["median"]["first_text_seconds"] <= side["median"]["seconds"]
