"""dataset/tokenizer_identity.py, and what an adapter says when the tokenizer is another"""

import json
import shutil

import pytest

from mlx_qlora.config import LoraConfig, ModelConfig, QuantizationConfig
from mlx_qlora.dataset import ensure_chat_template, render_prompt, tokenizer_sha256
from mlx_qlora.errors import AdapterError
from mlx_qlora.inference.chat import Chat
from mlx_qlora.inference.generate import load_assistant
from mlx_qlora.lora.adapter import (
    CONFIG,
    INFO_DIGEST,
    OURS,
    AdapterInfo,
    adapter_tensors,
    read_adapter_info,
    save_adapter,
    text_sha256,
)
from tests.chat_tokenizers import tokenizer_named
from tests.tiny import tiny_llama, with_lora

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize("name", ["chatml", "llama3", "demo", "stories260k"])
def test_a_tokenizer_loaded_again_is_the_same_wrapped_or_not_whatever_its_template(name):
    one, other = tokenizer_named(name), tokenizer_named(name, wrapped=True)
    ensure_chat_template(other, TEMPLATE)
    assert tokenizer_sha256(one) == tokenizer_sha256(other)


def test_a_padding_token_that_is_added_later_does_not_count():
    one = tokenizer_named("chatml")
    before = tokenizer_sha256(one)
    one.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    assert tokenizer_sha256(one) == before


def changed(folder, how: str) -> None:
    settings, model = (
        json.loads((folder / n).read_text()) for n in ("tokenizer_config.json", "tokenizer.json")
    )
    if how == "another eos":
        settings["eos_token"] = "<|endoftext|>"
    elif how == "another number for a word":
        vocabulary = model["model"]["vocab"]
        first, second = sorted(vocabulary)[-2:]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    elif how == "another way to cut":
        model["model"]["merges"] = model["model"]["merges"][:5]
    else:
        model["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text(json.dumps(model))


CHANGES = ["another eos", "another number for a word", "another way to cut", "another normalizer"]


@pytest.fixture
def trained(tiny_llama_folder, tmp_path):
    """A base of its own, and an adapter of it that knows its tokenizer."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny_llama_folder, base)
    bare = load_assistant(str(base), dtype="float32")
    info = AdapterInfo(
        model=ModelConfig(path=str(base), dtype="float32"),
        quantization=QuantizationConfig(scheme="none"),
        lora=LoraConfig(rank=4),
        fingerprint=bare.base.fingerprint,
        chat_template=TEMPLATE,
        chat_template_sha256=text_sha256(TEMPLATE),
        tokenizer_sha256=tokenizer_sha256(bare.tokenizer),
    )
    tensors = adapter_tensors(with_lora(bare.model, target_modules=("q_proj", "k_proj", "v_proj")))
    save_adapter(adapter, tensors, info, num_layers=2)
    return base, adapter


def test_with_its_own_tokenizer_it_answers_by_its_own_template(trained):
    assistant = load_assistant(adapter_path=trained[1])
    inner = assistant.tokenizer._tokenizer
    assert render_prompt(assistant.tokenizer, [{"role": "user", "content": "oi"}]) == inner("oi")["input_ids"]


@pytest.mark.parametrize("how", CHANGES)
def test_with_another_tokenizer_it_is_refused_by_name(trained, how):
    base, adapter = trained
    changed(base, how)
    with pytest.raises(AdapterError, match="tokenizer is not the one the adapter was trained with"):
        load_assistant(adapter_path=adapter)


def test_a_chat_refuses_it_too_and_goes_on_as_it_was(trained):
    base, adapter = trained
    changed(base, "another eos")
    chat = Chat(load_assistant(str(base), dtype="float32"))
    before = chat.assistant
    with pytest.raises(AdapterError, match="tokenizer is not the one"):
        chat.switch_adapter(adapter)
    assert chat.assistant is before


def test_an_adapter_from_before_this_was_known_loads_and_its_checksum_holds(trained):
    base, adapter = trained
    info = read_adapter_info(adapter).model_copy(update={"tokenizer_sha256": None})
    save_adapter(adapter, adapter_tensors(with_lora(tiny_llama())), info, num_layers=2)
    tree = json.loads((adapter / CONFIG).read_text())
    del tree[OURS]["tokenizer_sha256"]  # as it was written then
    old = {key: value for key, value in tree[OURS].items() if key != "model"}
    assert tree[INFO_DIGEST] == text_sha256(json.dumps(old, sort_keys=True))
    (adapter / CONFIG).write_text(json.dumps(tree))
    changed(base, "another eos")
    read_adapter_info(adapter).check_tokenizer("whatever it is")


def test_the_digest_is_guarded_by_the_checksum_as_all_else_is(trained):
    tree = json.loads((trained[1] / CONFIG).read_text())
    tree[OURS]["tokenizer_sha256"] = "0" * 64
    (trained[1] / CONFIG).write_text(json.dumps(tree))
    with pytest.raises(AdapterError, match="changed or damaged"):
        read_adapter_info(trained[1])
