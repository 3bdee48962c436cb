"""Each variant and each beginning in a whole run: stopped and resumed, loaded here and in mlx-lm."""

import json

import mlx.core as mx
import pytest
from mlx_lm.tuner.utils import load_adapters

from mlx_qlora.config import build_config
from mlx_qlora.inference.generate import load_assistant
from mlx_qlora.lora.adapter import read_adapter_info
from mlx_qlora.lora.layers import lora_layers
from mlx_qlora.training.events import StepDone
from mlx_qlora.training.run import resumed_config, train
from mlx_qlora.weights.loader import load_base

TOKENS = mx.array([[1, 5, 9, 33, 2, 60, 7]])
CHOICES = {
    "rslora": {"lora": {"variant": "rslora"}},
    "dora": {"lora": {"variant": "dora", "dropout": 0.2}},
    "lora+": {"training": {"lora_plus_ratio": 16}},
    "pissa": {"lora": {"init": "pissa", "dropout": 0.2}},
    "loftq": {"lora": {"init": "loftq"}},
    "dora+loftq": {"lora": {"variant": "dora", "init": "loftq"}, "training": {"lora_plus_ratio": 4}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    rows = [{"prompt": f"o clube {i}?", "completion": f"venceu {i % 3}"} for i in range(14)]
    for name, part in (("train", rows[:10]), ("valid", rows[10:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)) + "\n")
    return folder


def config_of(model, data, choice):
    settings = {
        "model": {"path": str(model)},
        "data": {"path": str(data), "max_seq_length": 64},
        "lora": {"rank": 4, "target_modules": ["q_proj", "down_proj"]},
        "training": {
            "max_steps": 6,
            "learning_rate": 0.005,
            "warmup_steps": 1,
            "steps_per_checkpoint": 2,
            "steps_per_validation": 3,
        },
    }
    return build_config(settings, CHOICES[choice])


class Stopped(Exception):
    """As a kill would be, but told apart."""


def stop_after(step):
    def observer(event):
        if isinstance(event, StepDone) and event.step == step:
            raise Stopped

    return observer


@pytest.mark.parametrize("init", [pytest.param("pissa", marks=pytest.mark.slow), "loftq"])
def test_a_run_begins_where_lora_init_says(tiny_llama_folder, data, tmp_path, init):
    config = config_of(tiny_llama_folder, data, init)
    config = build_config(
        config.model_dump(mode="json"), {"training": {"max_steps": 1, "learning_rate": 1e-9}}
    )
    run = train(config, tmp_path / "run")
    for layer in lora_layers(run.base.model):
        assert mx.abs(layer.lora_b).max().item() > 1e-4  # by default it would be zero still


QUICK = ("pissa",)
RUNS = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CHOICES]


@pytest.mark.parametrize("choice", RUNS)
def test_a_run_stopped_and_resumed_ends_with_the_same_bytes_and_loads_everywhere(
    tiny_llama_folder, data, tmp_path, choice
):
    config = config_of(tiny_llama_folder, data, choice)
    quiet, stopped = tmp_path / "quiet", tmp_path / "stopped"
    run = train(config, quiet)
    with pytest.raises(Stopped):
        train(config, stopped, observers=[stop_after(5)])
    train(resumed_config(stopped), stopped, resume=True)
    for name in ("adapters.safetensors", "adapter_config.json"):
        assert (quiet / name).read_bytes() == (stopped / name).read_bytes()

    assistant = load_assistant(adapter_path=quiet)
    assert read_adapter_info(quiet).lora.variant == config.lora.variant
    base = load_base(config.model, config.quantization)
    plain = base.model(TOKENS)
    theirs = load_adapters(base.model, str(quiet)).eval()
    ours = assistant.model(TOKENS)
    size = mx.abs(ours).max().item()
    assert mx.abs(theirs(TOKENS) - ours).max().item() < 1e-5 * size
    assert mx.abs(plain - ours).max().item() > 1e-3 * size
    if run.finished.best_step == run.finished.steps:
        assert mx.abs(run.base.model(TOKENS) - ours).max().item() < 1e-5 * size
