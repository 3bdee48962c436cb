"""The tokenizer of a GGUF file gives the ids that llama.cpp gives."""

import json

import pytest
from mlx_lm.utils import load_tokenizer

from mlx_qlora.errors import ModelError
from mlx_qlora.weights.gguf import import_gguf
from mlx_qlora.weights.gguf_file import read_gguf
from mlx_qlora.weights.gguf_tokenizer import build_tokenizer
from tests.gguf_files import vocabulary, write_model


def bpe(pre: str, words=(), merges=(), **more):
    """A byte-level vocabulary of all bytes and some words."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*bytes_to_unicode().values(), "ab", *words, "<|begin|>", "<|end|>"]
    tokens += [f"[PAD{i}]" for i in range(320 - len(tokens))]
    types = [3 if token.startswith("<|") else 5 if token.startswith("[PAD") else 1 for token in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": list(merges) or ["a b"],
        "tokenizer.ggml.bos_token_id": tokens.index("<|begin|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|end|>"),
        **more,
    }


def build(path, monkeypatch, **metadata):
    """The tokenizer of a tiny file with that metadata in place of `vocabulary`'s."""
    keys = {**vocabulary(), **metadata} if metadata.get("tokenizer.ggml.model") != "gpt2" else metadata
    monkeypatch.setattr(
        "tests.gguf_files.vocabulary", lambda: {k: v for k, v in keys.items() if v is not None}
    )
    write_model(path, "llama")
    return build_tokenizer(read_gguf(path))


def ids(tokenizer, text, special=False):
    return tokenizer.encode(text, add_special_tokens=special).ids


@pytest.mark.parametrize("name", ["llama-spm", "gpt-2"])
def test_llama_cpps_own_test_vectors_hold(material, name):
    path = material / "gguf" / "vocab-only" / f"ggml-vocab-{name}.gguf"
    tokenizer = build_tokenizer(read_gguf(path))
    texts = path.with_name(f"{path.name}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = path.with_name(f"{path.name}.out").read_text().split("\n")[: len(texts)]
    assert len(texts) == len(lines) == 47
    for text, line in zip(texts, lines, strict=True):
        assert ids(tokenizer, text) == [int(token) for token in line.split()], text


def test_the_real_file_tokenizes_as_the_model_it_was_made_from(material, tmp_path):
    import_gguf(material / "gguf/stories260k/stories260K-q8_0.gguf", tmp_path / "out")
    ours, theirs = load_tokenizer(tmp_path / "out"), load_tokenizer(material / "stories260k" / "hf")
    for text in ("Once upon a time, there was a little girl.", "Zoë ∑ 12", "a\n\n b"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text, add_special_tokens=False)) == text
    assert ours.eos_token_ids == theirs.eos_token_ids


def test_sentencepiece_spaces_follow_the_file(tmp_path, monkeypatch):
    tokens = vocabulary()["tokenizer.ggml.tokens"]
    space, the = tokens.index("▁"), tokens.index("▁the")
    with_space = build(tmp_path / "a.gguf", monkeypatch)
    assert ids(with_space, "the") == [the]
    assert ids(with_space, " the") == [space, the]
    assert with_space.decode(ids(with_space, " the")) == " the"
    without = build(tmp_path / "b.gguf", monkeypatch, **{"tokenizer.ggml.add_space_prefix": False})
    assert ids(without, " the") == [the]
    assert the not in ids(without, "the")
    assert without.decode(ids(without, " the")) == " the"


@pytest.mark.parametrize(
    ("bos", "eos", "expected"),
    [(True, False, [1, 270]), (False, True, [270, 2]), (True, True, [1, 270, 2]), (None, None, [1, 270])],
)
def test_a_text_begins_and_ends_as_the_file_says(tmp_path, monkeypatch, bos, eos, expected):
    flags = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    tokenizer = build(tmp_path / "m.gguf", monkeypatch, **flags)
    assert tokenizer.token_to_id("k") == 270
    plain = ids(tokenizer, "k", special=True)
    assert [token for token in plain if token != tokenizer.token_to_id("▁")] == expected


def test_special_tokens_stay_whole(tmp_path, monkeypatch):
    tokenizer = build(tmp_path / "m.gguf", monkeypatch, **bpe("gpt-2"))
    assert ids(tokenizer, "<|begin|>a<|end|>") == [
        tokenizer.token_to_id(t) for t in ("<|begin|>", "a", "<|end|>")
    ]


def test_a_word_that_is_a_token_ignores_its_merges_as_in_llama_3(tmp_path, monkeypatch):
    vocabulary_ = {"words": ["xyz", "xy"], "merges": ["x y"]}
    whole = build(tmp_path / "a.gguf", monkeypatch, **bpe("llama-bpe", **vocabulary_))
    assert ids(whole, "xyz") == [whole.token_to_id("xyz")]
    merged = build(tmp_path / "b.gguf", monkeypatch, **bpe("gpt-2", **vocabulary_))
    assert ids(merged, "xyz") == [merged.token_to_id("xy"), merged.token_to_id("z")]
    assert ids(whole, "x", special=True)[0] == whole.token_to_id("<|begin|>")
    assert ids(merged, "x", special=True)[0] == merged.token_to_id("x")


def test_digits_stand_apart_where_the_file_says_so(tmp_path, monkeypatch):
    vocabulary_ = {"words": ["12"], "merges": ["1 2"]}
    apart = build(tmp_path / "a.gguf", monkeypatch, **bpe("smollm", **vocabulary_))
    assert len(ids(apart, "12")) == 2
    together = build(tmp_path / "b.gguf", monkeypatch, **bpe("gpt-2", **vocabulary_))
    assert len(ids(together, "12")) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer.ggml.tokens": None}, "holds no tokenizer"),
        ({"tokenizer.ggml.model": "bert"}, "'bert' is neither"),
        ({"tokenizer.ggml.scores": [0.0, 1.0]}, "another number of scores"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "another number of token_type"),
        ({"tokenizer.ggml.scores": None}, "neither scores nor merges"),
        ({"tokenizer.ggml.merges": ["a"]}, "no pair of tokens"),
        (bpe("some-new-split"), "'some-new-split'"),
        ({**bpe("gpt-2"), "tokenizer.ggml.merges": None}, "there are no merges"),
        (bpe("gpt-2", merges=["not there"]), "tokenizer in the file is broken"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_is_refused(tmp_path, monkeypatch, changes, said):
    with pytest.raises(ModelError, match=said):
        build(tmp_path / "m.gguf", monkeypatch, **changes)


def test_chat_template_and_ends_of_text_are_kept(tmp_path):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    more = {"tokenizer.chat_template": template, "tokenizer.ggml.eot_token_id": 5}
    write_model(tmp_path / "m.gguf", "llama", metadata=more)
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = load_tokenizer(
        tmp_path / "out", eos_token_ids=json.loads(config_text(tmp_path))["eos_token_id"]
    )
    messages = [{"role": "user", "content": "the"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "the"
    assert tokenizer.eos_token_ids == {2, 5}
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def config_text(folder):
    return (folder / "out" / "config.json").read_text()


def test_a_special_token_outside_of_the_vocabulary_is_none(tmp_path):
    write_model(tmp_path / "m.gguf", "llama", metadata={"tokenizer.ggml.padding_token_id": 99_999})
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert "pad_token_id" not in json.loads(config_text(tmp_path))
