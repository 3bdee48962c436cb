"""Tokenizers go into GGUF with the same tokens for the same text, or are refused with the way round."""

import json
from pathlib import Path

import numpy as np
import pytest

from mlx_qlora.errors import ModelError
from mlx_qlora.exchange.gguf_layout import layout_of
from mlx_qlora.exchange.gguf_pre import CHECK_TEXT, KNOWN, digest_of, find_pre
from mlx_qlora.exchange.gguf_vocabulary import vocabulary_of
from mlx_qlora.weights.gguf_file import GgufFile, read_gguf
from mlx_qlora.weights.gguf_tokenizer import build_tokenizer, write_tokenizer
from mlx_qlora.weights.source import ModelSource
from tests.conftest import CHATML, save_tokenizer
from tests.gguf_files import full_config

PREFIX = "tokenizer.ggml."
DEMO = Path(__file__).parents[3] / "data" / "demo" / "model"


def exported(folder, vocab_size, pre=None, **changes):
    source = ModelSource(folder, str(folder), None, full_config("llama", vocab_size=vocab_size, **changes))
    (folder / "config.json").write_text(json.dumps(source.config))
    return vocabulary_of(source, layout_of(source), vocab_size, pre)


def rebuilt(vocabulary):
    metadata = {**vocabulary.metadata, "general.architecture": "llama"}
    return build_tokenizer(GgufFile(Path("a.gguf"), metadata, {}, 0))


def copied(folder, target, *names):
    target.mkdir()
    for name in names:
        (target / name).write_bytes((folder / name).read_bytes())
    return target


@pytest.fixture
def byte_level(tmp_path):
    folder = tmp_path / "bpe"
    folder.mkdir()
    save_tokenizer(folder)
    return folder


def test_the_check_text_is_llama_cpps_down_to_the_last_byte(material, tmp_path):
    file = read_gguf(material / "gguf" / "vocab-only" / "ggml-vocab-gpt-2.gguf")
    write_tokenizer(file, tmp_path)
    backend = build_tokenizer(file)
    ids = backend.encode(CHECK_TEXT, add_special_tokens=False).ids
    assert KNOWN[digest_of(ids)] == "gpt-2"
    assert exported(tmp_path, len(file.metadata[f"{PREFIX}tokens"])).metadata[f"{PREFIX}pre"] == "gpt-2"


def test_a_tokenizer_that_begins_with_bos_is_found_with_and_without_it():
    ids = [5, 6, 7]
    with_bos = digest_of([1, *ids])
    KNOWN[with_bos] = "test"
    try:
        assert find_pre(lambda _text: ids, 1) == "test"
        assert find_pre(lambda _text: [1, *ids], None) == "test"
        assert find_pre(lambda _text: ids, None) is None
    finally:
        del KNOWN[with_bos]


def test_a_name_that_llama_cpp_has_and_we_cannot_try_is_believed(byte_level):
    assert exported(byte_level, 320, "deepseek-llm").metadata[f"{PREFIX}pre"] == "deepseek-llm"
    assert all(len(digest) == 64 for digest in KNOWN)


@pytest.fixture
def demo(tmp_path):
    return copied(DEMO, tmp_path / "demo", "tokenizer.json", "tokenizer_config.json")


def test_an_unknown_way_to_split_is_an_error_that_names_one_that_fits(demo):
    with pytest.raises(ModelError, match="in no table") as failure:
        exported(demo, 1280)
    assert "--pre gpt-2" in str(failure.value)
    assert exported(demo, 1280, "gpt-2").metadata[f"{PREFIX}pre"] == "gpt-2"


def test_a_way_to_split_that_gives_other_tokens_is_refused(demo):
    with pytest.raises(ModelError, match="gives other tokens") as failure:
        exported(demo, 1280, "qwen2")
    assert "--pre gpt-2" in str(failure.value)
    with pytest.raises(ModelError, match="under the name 'gpt-9'"):
        exported(demo, 1280, "gpt-9")


def test_byte_level_tokens_types_merges_and_template_are_there(byte_level):
    said = exported(byte_level, 330, "gpt-2", eos_token_id=[2, 7, 9]).metadata
    tree = json.loads((byte_level / "tokenizer.json").read_text())
    tokens = said[f"{PREFIX}tokens"]
    count = len(tree["model"]["vocab"])
    assert {text: index for index, text in enumerate(tokens[:count])} == tree["model"]["vocab"]
    assert tokens[count:] == [f"[PAD{index}]" for index in range(count, 330)]
    assert said[f"{PREFIX}token_type"].tolist() == [3, 3, 3, *[1] * (count - 3), *[5] * (330 - count)]
    assert said[f"{PREFIX}merges"] == [" ".join(merge) for merge in tree["model"]["merges"]]
    assert said["tokenizer.chat_template"] == CHATML
    ids = {key: said[f"{PREFIX}{key}_token_id"] for key in ("eos", "padding", "eot", "eom")}
    assert ids == {"eos": 2, "padding": 0, "eot": 7, "eom": 9}
    assert said[f"{PREFIX}add_bos_token"] is said[f"{PREFIX}add_eos_token"] is False


def test_tokens_that_frame_a_text_are_said(byte_level):
    tree = json.loads((byte_level / "tokenizer.json").read_text())
    frame = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}
    tree["post_processor"] = {
        "type": "TemplateProcessing", "single": frame, "pair": frame, "special_tokens": special
    }  # fmt: skip
    (byte_level / "tokenizer.json").write_text(json.dumps(tree))
    said = exported(byte_level, 320, "gpt-2").metadata
    assert said[f"{PREFIX}add_bos_token"] is True
    assert said[f"{PREFIX}bos_token_id"] == 1


def test_tokens_without_a_row_in_the_embedding_are_left_out_and_said(byte_level):
    count = len(json.loads((byte_level / "tokenizer.json").read_text())["model"]["vocab"])
    vocabulary = exported(byte_level, count - 10, "gpt-2")
    assert len(vocabulary.metadata[f"{PREFIX}tokens"]) == count - 10
    assert "10 tokens have no row" in vocabulary.notes[0]


def test_named_templates_are_all_there(byte_level):
    settings = json.loads((byte_level / "tokenizer_config.json").read_text())
    settings["chat_template"] = [
        {"name": "default", "template": CHATML},
        {"name": "tool_use", "template": "{{ tools }}"},
    ]
    (byte_level / "tokenizer_config.json").write_text(json.dumps(settings))
    said = exported(byte_level, 320, "gpt-2").metadata
    assert said["tokenizer.chat_template"] == CHATML
    assert said["tokenizer.chat_template.tool_use"] == "{{ tools }}"
    assert said["tokenizer.chat_templates"] == ["tool_use"]


def test_a_vocabulary_of_another_kind_is_refused(byte_level):
    tree = json.loads((byte_level / "tokenizer.json").read_text())
    words = {text: index for index, text in enumerate(tree["model"]["vocab"])}
    tree["model"] = {"type": "WordLevel", "vocab": words, "unk_token": "<|endoftext|>"}
    (byte_level / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(ModelError, match="no tokenizer of the kind WordLevel"):
        exported(byte_level, 320)


@pytest.mark.parametrize(
    "files",
    [
        ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
        ("tokenizer.json", "tokenizer_config.json"),
    ],
)
def test_a_sentencepiece_tokenizer_gives_the_same_tokens_with_its_model_file_and_without(
    material, tmp_path, files
):
    from tokenizers import Tokenizer

    folder = copied(material / "tokenizers" / "mistral-v1", tmp_path / "model", *files)
    vocabulary = exported(folder, 32_000)
    said = vocabulary.metadata
    backend, original = rebuilt(vocabulary), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in (CHECK_TEXT, "Once upon a time", "  two  spaces", "olá, você está bem?\n\n", ""):
        assert backend.encode(text).ids == original.encode(text).ids
    assert said[f"{PREFIX}token_type"][:5].tolist() == [2, 3, 3, 6, 6]
    assert (said[f"{PREFIX}add_bos_token"], said[f"{PREFIX}add_space_prefix"]) == (True, True)
    assert [said[f"{PREFIX}{key}_token_id"] for key in ("bos", "eos", "unknown")] == [1, 2, 0]
    assert vocabulary.notes == ()


def test_llama_cpps_own_vectors_hold_after_an_import_and_an_export(material, tmp_path):
    path = material / "gguf" / "vocab-only" / "ggml-vocab-llama-spm.gguf"
    file = read_gguf(path)
    write_tokenizer(file, tmp_path)
    vocabulary = exported(tmp_path, 32_000)
    for key in ("tokens", "token_type"):
        np.testing.assert_array_equal(vocabulary.metadata[f"{PREFIX}{key}"], file.metadata[f"{PREFIX}{key}"])
    backend = rebuilt(vocabulary)
    texts = path.with_name(path.name + ".inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    wanted = path.with_name(path.name + ".out").read_text(encoding="utf-8").splitlines()
    assert len(wanted) > 40
    for text, ids in zip(texts, wanted, strict=False):
        assert backend.encode(text, add_special_tokens=False).ids == [int(token) for token in ids.split()], (
            text
        )
