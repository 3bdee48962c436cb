"""llama.cpp loads what we export, and answers as we do."""

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model, load_tokenizer

from mlx_qlora.commands.demo import demo_config
from mlx_qlora.dataset import read_conversations
from mlx_qlora.exchange.gguf_adapter import export_gguf_adapter
from mlx_qlora.exchange.gguf_export import export_gguf
from mlx_qlora.inference.generate import load_assistant
from mlx_qlora.lora.layers import lora_layers
from mlx_qlora.training.run import train
from mlx_qlora.weights.gguf import import_gguf
from tests.conftest import save_tokenizer
from tests.gguf_files import KINDS, full_config, random_model

pytestmark = pytest.mark.peers
llama_cpp = pytest.importorskip("llama_cpp")

DEMO = Path(__file__).parents[2] / "data" / "demo"
STORY = "Once upon a time, there was a little"
QUESTION = "<|user|>O estádio do Académico de Lampolim abriu em que ano?<|assistant|>"
TOKENS = [1, 5, 270, 290, 17, 262, 261, 3, 290, 264] * 4
GELU_KINDS = ("gemma", "phi2")
"""llama.cpp looks their activation up in a table of float16."""


@pytest.fixture(autouse=True)
def plain_buffers(monkeypatch):
    """llama.cpp repacks quantized rows for some CPUs and crashes on rows of 64: that is its own."""
    default = llama_cpp.llama_cpp.llama_model_default_params

    def without_extra():
        params = default()
        params.use_extra_bufts = False
        return params

    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", without_extra)


class LlamaCpp:
    """A GGUF file in llama.cpp, with a float32 cache."""

    def __init__(self, path, lora=None):
        self.llama = llama_cpp.Llama(
            str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1,
            type_k=0, type_v=0, lora_path=None if lora is None else str(lora),
        )  # fmt: skip

    def logits(self, tokens):
        self.llama.reset()
        self.llama.eval(tokens)
        return np.array(self.llama.scores[: len(tokens)])

    def greedy(self, tokens, count):
        self.llama.reset()
        self.llama.eval(tokens)
        found = []
        for _ in range(count):
            found.append(int(np.argmax(self.llama.scores[self.llama.n_tokens - 1])))
            self.llama.eval(found[-1:])
        return found

    def tokenize(self, text):
        return self.llama.tokenize(text.encode(), add_bos=True, special=True)


def our_logits(model, tokens):
    return np.array(model(mx.array([tokens])).astype(mx.float32))[0]


def our_greedy(model, tokens, count):
    cache, x, found = make_prompt_cache(model), mx.array([tokens]), []
    for _ in range(count):
        found.append(int(mx.argmax(model(x, cache=cache)[0, -1]).item()))
        x = mx.array([found[-1:]])
    return found


def in_float32(folder):
    model, _ = load_model(folder)
    is_float = lambda array: mx.issubdtype(array.dtype, mx.floating)  # noqa: E731
    model.update(tree_map(lambda a: a.astype(mx.float32) if is_float(a) else a, model.parameters()))
    return model


def relative(found, expected):
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture(params=["stories260k", "demo"])
def real_model(request):
    """(folder, pre, prompt)"""
    if request.param == "demo":
        return DEMO / "model", "gpt-2", QUESTION
    return request.getfixturevalue("material") / "stories260k" / "hf", None, STORY


@pytest.mark.parametrize(
    ("type_name", "most"), [("auto", 4e-3), ("f32", 2e-6), ("f16", 2e-3), ("q8_0", 0.02), ("q4_1", 0.02)]
)
def test_a_real_model_gives_our_tokens_our_logits_and_our_text(tmp_path, real_model, type_name, most):
    folder, pre, prompt = real_model
    export_gguf(folder, tmp_path / "a.gguf", type_name=type_name, pre=pre)
    theirs, tokenizer = LlamaCpp(tmp_path / "a.gguf"), load_tokenizer(folder)
    tokens = tokenizer.encode(prompt)
    assert theirs.tokenize(prompt) == tokens
    import_gguf(tmp_path / "a.gguf", tmp_path / "back")  # the numbers in the file, rounded or not
    ours = in_float32(tmp_path / "back")
    # llama.cpp rounds activations to the weights' kind: eight bits where these are quantized.
    error = relative(theirs.logits(tokens), our_logits(ours, tokens))
    print(f"{folder.name} {type_name}: relative error of logits {error:.1e}")
    assert error < most
    assert theirs.greedy(tokens, 32) == our_greedy(ours, tokens, 32)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("mixtral-old", "phi2-fused")])
def test_every_architecture_gives_our_logits(tmp_path, kind):
    config, folder = full_config(kind), tmp_path / "model"
    folder.mkdir()
    save_tokenizer(folder)
    model = random_model(config)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    export_gguf(folder, tmp_path / "a.gguf", pre="gpt-2", name="tiny")
    error = relative(LlamaCpp(tmp_path / "a.gguf").logits(TOKENS), our_logits(model, TOKENS))
    print(f"{kind}: relative error of logits {error:.1e}")
    assert error < (3e-3 if kind.startswith(GELU_KINDS) else 3e-6)


@pytest.mark.parametrize("name", ["q8_0", "q4_1", "f16"])
def test_llama_cpps_own_file_gives_the_same_logits_after_an_import_and_an_export(material, tmp_path, name):
    original = material / "gguf" / "stories260k" / f"stories260K-{name}.gguf"
    import_gguf(original, tmp_path / "model")
    export_gguf(tmp_path / "model", tmp_path / "a.gguf")
    one, two = LlamaCpp(original), LlamaCpp(tmp_path / "a.gguf")
    tokens = one.tokenize(STORY)
    assert two.tokenize(STORY) == tokens
    np.testing.assert_array_equal(one.logits(tokens), two.logits(tokens))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An adapter that really learned something of the demo's club."""
    config = demo_config()
    training = config.training.model_copy(update={"max_steps": 40, "steps_per_validation": 1000})
    adapter = tmp_path_factory.mktemp("trained") / "club"
    train(config.model_copy(update={"training": training}), adapter)
    return adapter


def answers(greedy, prompts, end):
    texts = [greedy(prompt, 24) for prompt in prompts]
    return [text[: text.index(end)] if end in text else text for text in texts]


@pytest.mark.slow
def test_a_trained_adapter_answers_in_llama_cpp_as_it_does_here_and_so_does_the_fused_model(
    tmp_path, trained
):
    assistant = load_assistant(adapter_path=trained)
    tokenizer, model = assistant.base.tokenizer, assistant.base.model
    rows = read_conversations(DEMO / "club" / "test.jsonl")[:4]
    prompts = [tokenizer.apply_chat_template(row[:-1], add_generation_prompt=True) for row in rows]
    ours = answers(lambda *args: our_greedy(model, *args), prompts, tokenizer.eos_token_id)
    export_gguf_adapter(trained, tmp_path / "club.gguf")
    for type_name, most in (("f32", 3e-6), ("auto", 0.03)):
        base = tmp_path / f"{type_name}.gguf"
        export_gguf(assistant.base.folder, base, type_name=type_name, pre="gpt-2")
        adapted = LlamaCpp(base, tmp_path / "club.gguf")
        error = max(relative(adapted.logits(p), our_logits(model, p)) for p in prompts)
        print(f"adapter on {type_name}: relative error of logits {error:.1e}")
        assert error < most
        assert answers(adapted.greedy, prompts, tokenizer.eos_token_id) == ours
    assert answers(LlamaCpp(base).greedy, prompts, tokenizer.eos_token_id) != ours
    fuse(model, assistant.base, tmp_path / "fused")
    export_gguf(tmp_path / "fused", tmp_path / "fused.gguf", pre="gpt-2")
    fused = LlamaCpp(tmp_path / "fused.gguf")
    error = max(relative(fused.logits(p), our_logits(model, p)) for p in prompts)
    print(f"fused: relative error of logits {error:.1e}")
    assert error < 1e-5
    assert answers(fused.greedy, prompts, tokenizer.eos_token_id) == ours


def fuse(model, base, folder):
    """W + scale · (A B)ᵀ in float32, written out here by hand."""
    folder.mkdir()
    layers = {id(layer) for layer in lora_layers(model)}
    tensors = {}
    for path, module in model.named_modules():
        if id(module) in layers:
            inner = module.linear
            weight = mx.dequantize(inner.weight, inner.scales, inner.biases, inner.group_size, inner.bits)
            tensors[f"{path}.weight"] = weight + module.scale * (module.lora_a @ module.lora_b).T
        elif "weight" in module and not path.endswith(".linear"):
            is_packed = "scales" in module
            tensors[f"{path}.weight"] = (
                mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)
                if is_packed
                else module.weight
            )
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    config = {key: value for key, value in base.config.items() if not key.startswith("quantization")}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((base.folder / name).read_bytes())
    assert math.isclose(sum(a.size for a in tensors.values()), base.num_parameters)
