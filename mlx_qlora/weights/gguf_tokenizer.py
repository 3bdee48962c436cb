"""The tokenizer inside a GGUF file, written as tokenizer.json and tokenizer_config.json.

transformers builds the vocabulary and merges. Where llama.cpp does something else with spaces or whole words,
it is followed: its own test vectors are the measure. Source: ggml-org/llama.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mlx_qlora.errors import ModelError
from mlx_qlora.storage import write_json, write_text
from mlx_qlora.weights.gguf_file import GgufFile
from mlx_qlora.weights.gguf_metadata import special_token

_AS_GPT2 = {"gpt-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "phi-2", "roberta-bpe", "default"}
_DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_WHOLE_WORDS = {
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "jina-v5-nano",
    "tekken",
}
"""A word that is a token itself is that token, whatever the merges would make of it."""

_BEGIN_WITH_BOS = _WHOLE_WORDS - {"tekken"}
"""llama.cpp begins a text with BOS here even when the file does not say so."""

_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def write_tokenizer(file: GgufFile, folder: Path) -> list[str]:
    """Write the tokenizer's files into `folder`; their names.

    Raises:
        ModelError: there is no tokenizer, it contradicts itself, or is of a kind that cannot be built.
    """
    backend = build_tokenizer(file)
    tokens = file.metadata["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _positive(file.metadata.get(f"{_architecture(file)}.context_length")),
        "clean_up_tokenization_spaces": False,
    }
    for key, name in _SPECIAL.items():
        if (token := special_token(file, name)) is not None:
            config[key] = tokens[token]
    if template := _chat_template(file):
        config["chat_template"] = template
    write_text(folder / "tokenizer.json", backend.to_str(pretty=True))
    write_json(
        folder / "tokenizer_config.json", {key: value for key, value in config.items() if value is not None}
    )
    return ["tokenizer.json", "tokenizer_config.json"]


def build_tokenizer(file: GgufFile) -> Any:
    """The same text to the same ids as llama.cpp: a ``tokenizers.Tokenizer``.

    Raises:
        ModelError: as for `write_tokenizer`.
    """
    described = _described(file)
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer
    except ImportError:
        raise ModelError(
            "Your transformers cannot read the tokenizer of a GGUF file.",
            where=str(file.path),
            run="pip install -U transformers",
        ) from None
    try:
        backend, _ = convert_gguf_tokenizer(_architecture(file), described)
    except Exception as error:  # whatever it makes of a vocabulary it does not expect
        raise ModelError(
            f"The tokenizer in the file is broken: {type(error).__name__}: {str(error)[:200]}",
            where=str(file.path),
        ) from error
    _follow_llama_cpp(backend, file, described)
    _begin_and_end(backend, file, described)
    return backend


def _described(file: GgufFile) -> dict[str, Any]:
    """The metadata that describe a tokenizer, checked, by the names transformers gives them."""
    said = {
        name: file.metadata.get(f"tokenizer.ggml.{key}")
        for name, key in {
            "tokenizer_type": "model",
            "pre_tokenizer_type": "pre",
            "tokens": "tokens",
            "scores": "scores",
            "token_type": "token_type",
            "merges": "merges",
        }.items()
    }
    tokens, kind = said["tokens"], said["tokenizer_type"]
    problems = []
    if not _are_texts(tokens) or not tokens:
        raise ModelError("The file holds no tokenizer (tokenizer.ggml.tokens).", where=str(file.path))
    if kind not in ("llama", "gpt2"):
        problems.append(
            f"its kind {str(kind)[:40]!r} is neither 'llama' (SentencePiece) nor 'gpt2' (byte-level BPE)"
        )
    for name in ("scores", "token_type"):
        value = said[name]
        if value is not None and (not isinstance(value, np.ndarray) or value.shape != (len(tokens),)):
            problems.append(f"there are {len(tokens)} tokens and another number of {name}")
    merges = said["merges"]
    if merges is not None and (not _are_texts(merges) or any(merge.count(" ") != 1 for merge in merges)):
        problems.append("a merge is no pair of tokens")
    if kind == "gpt2" and merges is None:
        problems.append("there are no merges")
    if kind == "llama" and said["scores"] is None and merges is None:
        problems.append("there are neither scores nor merges")
    if kind == "gpt2" and not _is_known(pre := said["pre_tokenizer_type"]):
        problems.append(f"it splits text as {str(pre)[:40]!r} does, which we do not know")
    if problems:
        raise ModelError(
            f"The file's tokenizer cannot be built: {'; '.join(problems)}.", where=str(file.path)
        )
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in said.items()
        if value is not None
    }


def _is_known(pre: object) -> bool:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    return pre is None or pre in {*GGUF_PRE_TOKENIZER_SPLITS, *_AS_GPT2, *_DIGITS_APART}


def _follow_llama_cpp(backend: Any, file: GgufFile, described: dict[str, Any]) -> None:
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    pre = described.get("pre_tokenizer_type")
    if described["tokenizer_type"] == "gpt2":
        if pre in _WHOLE_WORDS:
            backend.model.ignore_merges = True
        if pre in _DIGITS_APART:
            digits = pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated")
            words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
            backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
        return
    if _architecture(file).startswith("gemma"):
        return
    # Each stretch of text between special tokens gets a space in front, even where there is one already.
    has_prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True) is not False
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if has_prefix else spaces
    backend.pre_tokenizer = None
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if has_prefix else back)


def _begin_and_end(backend: Any, file: GgufFile, described: dict[str, Any]) -> None:
    from tokenizers import processors

    is_spm = described["tokenizer_type"] == "llama"
    defaults = {"bos": is_spm or described.get("pre_tokenizer_type") in _BEGIN_WITH_BOS, "eos": False}
    ids = {}
    for name, default in defaults.items():
        wanted = file.metadata.get(f"tokenizer.ggml.add_{name}_token", default) is True
        token = special_token(file, name)
        if wanted and token is not None:
            ids[name] = (f"<{name}>", token)
    if not ids:
        return
    text = described["tokens"]
    begin, end = (f"{text[ids[name][1]]}" if name in ids else None for name in ("bos", "eos"))
    single = [part for part in (begin, "$A", end) if part is not None]
    pair = [*single, *(f"{part}:1" for part in (begin, "$B", end) if part is not None)]
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(text[token], token) for _, token in ids.values()]
    )


def _chat_template(file: GgufFile) -> str | None:
    template = file.metadata.get("tokenizer.chat_template")
    return template if isinstance(template, str) and template else None


def _architecture(file: GgufFile) -> str:
    return str(file.metadata.get("general.architecture"))


def _positive(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
