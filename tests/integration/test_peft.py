"""Adapters from peft and to peft, on models that transformers and torch run beside ours."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_qlora.config import LoraConfig, ModelConfig, QuantizationConfig
from mlx_qlora.exchange.peft import export_peft, import_peft
from mlx_qlora.inference.generate import load_assistant
from mlx_qlora.lora.adapter import AdapterInfo, adapter_tensors, save_adapter, text_sha256
from mlx_qlora.lora.attach import attach
from mlx_qlora.weights.loader import load_base
from tests.conftest import save_tokenizer

pytestmark = pytest.mark.peers

TOKENS = [[1, 5, 9, 33, 2, 60, 7]]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "lora": {"target_modules": PROJECTIONS, "lora_alpha": 16},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "lora_alpha": 7},
    "dora": {"target_modules": PROJECTIONS, "use_dora": True, "lora_alpha": 9},
    "all-linear": {"target_modules": "all-linear"},
    "last layers": {"target_modules": ["q_proj"], "layers_to_transform": [1, 2]},
    "first layer": {"target_modules": ["up_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    "without some": {
        "target_modules": ["q_proj", "o_proj"],
        "exclude_modules": ["layers.1.self_attn.q_proj"],
    },
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "lora_alpha": 11},
}


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("peft")
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def bases(torch, tmp_path_factory):
    """Random models of transformers' own, in float32; q, k and v of Qwen2 have a bias."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    folders = {}
    for name, config, model_class, tied in (
        ("llama", LlamaConfig, LlamaForCausalLM, False),
        ("qwen2", Qwen2Config, Qwen2ForCausalLM, True),
    ):
        folder = tmp_path_factory.mktemp("bases") / name
        model = model_class(config(**SIZES, tie_word_embeddings=tied))
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        save_tokenizer(folder)
        tree = json.loads((folder / "config.json").read_text())
        tree["rope_theta"] = 10000.0  # where transformers 5 has it, mlx-lm's Qwen2 does not look
        (folder / "config.json").write_text(json.dumps(tree))
        folders[name] = folder
    return folders


def torch_model(torch, folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def torch_logits(torch, model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def peft_adapter(torch, base: Path, folder: Path, *, dtype=None, **settings):
    """A PEFT adapter with noise in every tensor, saved; its logits and its model."""
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **settings})
    model = peft.get_peft_model(torch_model(torch, base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
            if dtype is not None:
                parameter.data = parameter.data.to(dtype).float()
    model.eval().save_pretrained(folder)
    return torch_logits(torch, model)


def relative_error(logits: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(logits - wanted).max() / np.abs(wanted).max())


def our_logits(adapter: Path) -> np.ndarray:
    return np.array(load_assistant(adapter_path=adapter, dtype="float32").model(mx.array(TOKENS)))


CASES = [*(("llama", name) for name in ADAPTERS), ("qwen2", "lora"), ("qwen2", "dora")]


@pytest.mark.parametrize(("base", "name"), CASES)
def test_a_peft_adapter_gives_the_same_logits_here_and_comes_back_bit_for_bit(
    torch, bases, tmp_path, base, name
):
    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    wanted = peft_adapter(torch, bases[base], theirs, **ADAPTERS[name])
    plain = torch_logits(torch, torch_model(torch, bases[base]))
    import_peft(theirs, ours, model=str(bases[base]))
    assert relative_error(our_logits(ours), wanted) < 1e-5
    assert relative_error(plain, wanted) > 1e-3

    export_peft(ours, back)
    before = mx.load(str(theirs / "adapter_model.safetensors"))
    after = mx.load(str(back / "adapter_model.safetensors"))
    before = {key: array for key, array in before.items() if "base_layer" not in key}
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[key], after[key]) for key in before)
    import peft

    model = peft.PeftModel.from_pretrained(torch_model(torch, bases[base]), back).eval()
    assert np.array_equal(torch_logits(torch, model), wanted)


OURS = {
    "lora": {"target_modules": tuple(PROJECTIONS)},
    "rslora": {"variant": "rslora", "target_modules": ("q_proj", "v_proj"), "num_layers": 2},
    "dora": {"variant": "dora", "target_modules": ("q_proj", "down_proj")},
    "paths": {"target_modules": ("model.layers.0.mlp.*", "model.layers.2.*.q_proj")},
    "embeddings": {"target_modules": ("embed_tokens", "lm_head", "k_proj")},
}


def our_adapter(base: Path, folder: Path, **lora) -> None:
    """An adapter of ours with noise in every tensor, saved."""
    config = LoraConfig(**{"rank": 4, "alpha": 12.0, **lora})
    loaded = load_base(ModelConfig(path=str(base), dtype="float32"), QuantizationConfig(scheme="none"))
    attach(loaded.model, config, seed=0)
    tensors = {
        name: array + 0.1 * mx.random.normal(array.shape, key=mx.random.key(index))
        for index, (name, array) in enumerate(adapter_tensors(loaded.model).items())
    }
    info = AdapterInfo(
        model=ModelConfig(path=str(base)),
        quantization=QuantizationConfig(scheme="none"),
        lora=config,
        fingerprint=loaded.fingerprint,
        chat_template="{{ messages }}",
        chat_template_sha256=text_sha256("{{ messages }}"),
    )
    save_adapter(folder, tensors, info, num_layers=len(loaded.model.layers))


@pytest.mark.parametrize(
    ("base", "name"), [*(("llama", name) for name in OURS), ("qwen2", "lora"), ("qwen2", "dora")]
)
def test_an_adapter_of_ours_gives_the_same_logits_in_peft_and_comes_back_bit_for_bit(
    torch, bases, tmp_path, base, name
):
    import peft

    ours, theirs, back = tmp_path / "ours", tmp_path / "theirs", tmp_path / "back"
    our_adapter(bases[base], ours, **OURS[name])
    export_peft(ours, theirs)
    model = torch_model(torch, bases[base])
    plain = torch_logits(torch, model)
    wanted = torch_logits(torch, peft.PeftModel.from_pretrained(model, theirs).eval())
    assert relative_error(our_logits(ours), wanted) < 1e-5
    assert relative_error(plain, wanted) > 1e-3

    import_peft(theirs, back, model=str(bases[base]))
    before, after = (mx.load(str(folder / "adapters.safetensors")) for folder in (ours, back))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[key], after[key]) for key in before)


def test_sixteen_bits_stay_sixteen_bits(torch, bases, tmp_path):
    from safetensors.torch import load_file, save_file

    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    wanted = peft_adapter(torch, bases["llama"], theirs, dtype=torch.bfloat16, target_modules=["q_proj"])
    file = theirs / "adapter_model.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in load_file(file).items()}, file)
    import_peft(theirs, ours, model=str(bases["llama"]))
    export_peft(ours, back)
    before, after = load_file(file), load_file(back / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert relative_error(our_logits(ours), wanted) < 1e-5


def test_an_adapter_that_peft_converted_from_pissa_runs_here(torch, bases, tmp_path):
    """PEFT's own conversion doubles the rank, as ours does."""
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    model = peft.get_peft_model(torch_model(torch, bases["llama"]), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    wanted = torch_logits(torch, model.eval())
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    model.save_pretrained(theirs, path_initial_model_for_weight_conversion=tmp_path / "initial")
    assert import_peft(theirs, ours, model=str(bases["llama"])).lora.rank == 8
    assert relative_error(our_logits(ours), wanted) < 1e-5


def test_only_low_rank_tensors_are_trainable_in_what_was_loaded(torch, bases, tmp_path):
    peft_adapter(torch, bases["llama"], tmp_path / "theirs", **ADAPTERS["dora"])
    import_peft(tmp_path / "theirs", tmp_path / "ours", model=str(bases["llama"]))
    model = load_assistant(adapter_path=tmp_path / "ours").model
    leaves = {name.rpartition(".")[2] for name, _ in tree_flatten(model.trainable_parameters())}
    assert leaves == {"lora_a", "lora_b", "m"}
