"""A model's tokenizer as GGUF's metadata: tokens, scores or merges, special tokens, chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qlora.errors import MlxQloraError, ModelError
from mlx_qlora.exchange.gguf_layout import Layout
from mlx_qlora.exchange.gguf_pre import Encode, settled_pre
from mlx_qlora.exchange.gguf_sentencepiece import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    looks_special,
    read_pieces,
    scores_from_merges,
    type_of,
)
from mlx_qlora.weights.gguf_file import GgufFile
from mlx_qlora.weights.gguf_tokenizer import build_tokenizer
from mlx_qlora.weights.source import ModelSource
from mlx_qlora.weights.tokenizer import read_tokenizer

_PREFIX = "tokenizer.ggml."
_ADDED_SCORE, _PAD_SCORE = -1000.0, -10000.0
_SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}


_PHI3 = {"<unk>", "<s>", "</s>", "<|endoftext|>"}
"""llama.cpp looks these up in any model whose name has "phi3" or "phi-3" in it, and fails without them."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer's metadata, by full key, and what llama.cpp does otherwise."""

    metadata: dict[str, Any]
    notes: tuple[str, ...]


def vocabulary_of(source: ModelSource, layout: Layout, vocab_size: int, pre: str | None) -> Vocabulary:
    """The tokenizer in a model folder, for an embedding of `vocab_size` rows.

    Raises:
        ModelError: a kind that llama.cpp does not have, or one whose way to split text is not known.
    """
    return _Tokenizer(source, layout).vocabulary(vocab_size, pre)


def check_name(name: str, vocabulary: Vocabulary) -> None:
    """Raise ModelError if llama.cpp would take the name for that of a model with other tokens."""
    is_taken = any(part in name.lower() for part in ("phi-3", "phi3"))
    if is_taken and _PHI3 - set(vocabulary.metadata[f"{_PREFIX}tokens"]):
        raise ModelError(
            f"llama.cpp takes {name!r} for a Phi-3 by its name, and cannot load one without Phi-3's tokens.",
            run="the same command with --name and another name",
        )


class _Tokenizer:
    """The tokenizer that mlx-lm would use, and the JSON it is."""

    def __init__(self, source: ModelSource, layout: Layout) -> None:
        self.source, self.layout, self.where = source, layout, str(source.folder / "tokenizer.json")
        self.own = read_tokenizer(source.folder)._tokenizer
        try:
            self.tree = json.loads(self.own.backend_tokenizer.to_str())
        except Exception as error:  # whatever transformers makes of files it does not expect
            raise ModelError(
                f"The model's tokenizer cannot be loaded: {type(error).__name__}: {str(error)[:200]}",
                where=str(source.folder),
            ) from error
        self.model: dict[str, Any] = self.tree["model"]
        self.added = {int(token["id"]): token for token in self.tree["added_tokens"]}
        splits = _parts(self.tree["pre_tokenizer"])
        self.is_byte_level = any(part.get("type") == "ByteLevel" for part in splits)
        self.unknown = None if self.is_byte_level else self.model.get("unk_token") or self.own.unk_token
        self.notes: list[str] = []

    def encode(self, text: str) -> list[int]:
        """Ids without BOS and EOS."""
        return list(self.own.encode(text, add_special_tokens=False))

    def vocabulary(self, vocab_size: int, pre: str | None) -> Vocabulary:
        """All of it."""
        if self.model["type"] != "BPE":
            raise ModelError(
                f"llama.cpp has no tokenizer of the kind {self.model['type']} for this architecture.",
                where=self.where,
            )
        tokens, types = self._tokens(vocab_size)
        said: dict[str, Any] = {"tokens": tokens, "token_type": types}
        said |= self._special_ids()
        if self.is_byte_level:
            said |= self._byte_level(said, pre)
        else:
            said |= self._sentencepiece(tokens, types)
        metadata = {f"{_PREFIX}{key}": value for key, value in said.items()}
        metadata[f"{_PREFIX}token_type"] = np.array(said["token_type"], np.int32)
        return Vocabulary(metadata | self._templates(), tuple(self.notes))

    def _tokens(self, vocab_size: int) -> tuple[list[str], list[int]]:
        by_id = self._by_id()
        beyond = [by_id[token] for token in sorted(by_id) if token >= vocab_size]
        if beyond:
            self.notes.append(
                f"{len(beyond)} tokens have no row in the embedding and are left out: {beyond[:3]}"
            )
        tokens = [by_id.get(token, f"[PAD{token}]") for token in range(vocab_size)]
        types = [self._type(token, by_id) for token in range(vocab_size)]
        # llama.cpp looks for these in the text itself, where spaces are still spaces.
        pairs = zip(tokens, types, strict=True)
        return [text.replace("▁", " ") if kind == USER_DEFINED else text for text, kind in pairs], types

    def _by_id(self) -> dict[int, str]:
        added = {token: str(added["content"]) for token, added in self.added.items()}
        return {token: text for text, token in self.model["vocab"].items()} | added

    def _type(self, token: int, by_id: Mapping[int, str]) -> int:
        if token not in by_id:
            return UNUSED
        added = self.added.get(token)
        if by_id[token] == self.unknown:
            return UNKNOWN
        if added is not None:
            return CONTROL if added["special"] or looks_special(by_id[token]) else USER_DEFINED
        return NORMAL

    def _special_ids(self) -> dict[str, Any]:
        """Ids, and whether a text begins with BOS and ends in EOS: as the tokenizer does it."""
        plain, framed = self.encode("a"), list(self.own.encode("a"))
        before, after = _around(framed, plain)
        ids = {key: getattr(self.own, f"{name}_token_id", None) for key, name in _SPECIAL.items()}
        if len(before) > 1 or len(after) > 1:
            self.notes.append(f"llama.cpp puts one token around a text, this tokenizer {before} and {after}")
        if before:
            ids["bos"] = before[0]
        if after:
            ids["eos"] = after[-1]
        ends = self.source.config.get("eos_token_id")
        others = [end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)]
        if ids["eos"] is None and others:
            ids["eos"] = others[0]
        ids |= dict(zip(("eot", "eom"), (end for end in others if end != ids["eos"]), strict=False))
        said: dict[str, Any] = {
            f"{key}_token_id": int(token) for key, token in ids.items() if token is not None
        }
        return said | {"add_bos_token": bool(before), "add_eos_token": bool(after)}

    def _byte_level(self, said: Mapping[str, Any], pre: str | None) -> dict[str, Any]:
        merges = [" ".join(_pair(merge)) for merge in self.model["merges"]]
        self._note_normalizer(())
        own = {"model": "gpt2", "merges": merges}

        def rebuilt(name: str) -> Encode:
            return self._rebuilt({**said, **own, "pre": name})

        return own | {"pre": settled_pre(pre, self.encode, said.get("bos_token_id"), rebuilt, self.where)}

    def _sentencepiece(self, tokens: Sequence[str], types: list[int]) -> dict[str, Any]:
        normalizer = [part.get("type") for part in _parts(self.tree["normalizer"])]
        splits = [part for part in _parts(self.tree["pre_tokenizer"]) if part.get("type") == "Metaspace"]
        if not self.model.get("byte_fallback"):
            raise ModelError(
                "The tokenizer is neither SentencePiece's nor byte-level BPE; llama.cpp has no other.",
                where=self.where,
            )
        self._note_normalizer(("Prepend", "Replace"))
        has_prefix = "Prepend" in normalizer or any(
            part.get("prepend_scheme", "always") != "never" for part in splits
        )
        scores = self._scores(tokens)
        for token, text in enumerate(tokens):
            if types[token] == NORMAL:
                types[token] = type_of(text)
        return {
            "model": "llama",
            "pre": "default",
            "scores": np.array(scores, np.float32),
            "add_space_prefix": has_prefix,
        }

    def _scores(self, tokens: Sequence[str]) -> list[float]:
        path = self.source.folder / "tokenizer.model"
        pieces = _pieces(path, tokens)
        if pieces is None:
            merges = [_pair(merge) for merge in self.model["merges"]]
            try:
                known = scores_from_merges(self.model["vocab"], merges)
            except ValueError as error:
                raise ModelError(
                    f"llama.cpp would split text otherwise than this tokenizer: {error}.",
                    where=self.where,
                    run=f"put the original's tokenizer.model into {self.source.folder}; it has the scores",
                ) from None
        else:
            known = pieces
        scores = []
        for token, text in enumerate(tokens):
            is_there = token not in self.added and text in self.model["vocab"]
            added = _ADDED_SCORE if token in self.added else _PAD_SCORE
            scores.append(known.get(text, 0.0) if is_there else added)
        return scores

    def _note_normalizer(self, known: Sequence[str]) -> None:
        others = {str(part.get("type")) for part in _parts(self.tree["normalizer"])} - {*known, "Sequence"}
        if others:
            self.notes.append(f"llama.cpp does not normalize text by {', '.join(sorted(others))} first")

    def _rebuilt(self, said: Mapping[str, Any]) -> Encode:
        """The same vocabulary as the import builds it: it is tested against llama.cpp's own vectors."""
        by_id = self._by_id()
        whole = range(max(len(said["tokens"]), max(by_id) + 1))
        metadata = {f"{_PREFIX}{key}": value for key, value in said.items()}
        metadata[f"{_PREFIX}tokens"] = [by_id.get(token, f"[PAD{token}]") for token in whole]
        metadata[f"{_PREFIX}token_type"] = np.array([self._type(token, by_id) for token in whole], np.int32)
        metadata["general.architecture"] = self.layout.architecture
        try:
            backend = build_tokenizer(GgufFile(Path(self.where), metadata, {}, 0))
        except MlxQloraError:
            return lambda _text: ()
        return lambda text: backend.encode(text, add_special_tokens=False).ids

    def _templates(self) -> dict[str, Any]:
        template = getattr(self.own, "chat_template", None)
        if isinstance(template, str):
            return {"tokenizer.chat_template": template}
        if not isinstance(template, Mapping):
            return {}
        named = {str(name): str(text) for name, text in template.items()}
        said: dict[str, Any] = {
            f"tokenizer.chat_template.{name}": text for name, text in named.items() if name != "default"
        }
        if said:
            said["tokenizer.chat_templates"] = [name for name in named if name != "default"]
        return said | ({"tokenizer.chat_template": named["default"]} if "default" in named else {})


def _pieces(path: Path, tokens: Sequence[str]) -> dict[str, float] | None:
    """Scores by text from a tokenizer.model; None unless it is there and its tokens are these."""
    try:
        pieces = read_pieces(path)
    except (OSError, ValueError):
        return None
    there = zip(tokens, pieces, strict=False)
    is_same = all(token == piece.text for token, piece in there if piece.type == NORMAL)
    return {piece.text: piece.score for piece in pieces} if is_same else None


def _around(framed: Sequence[int], plain: Sequence[int]) -> tuple[list[int], list[int]]:
    """What stands before and after `plain` in `framed`."""
    for at in range(len(framed) - len(plain) + 1):
        if list(framed[at : at + len(plain)]) == list(plain):
            return list(framed[:at]), list(framed[at + len(plain) :])
    return [], []


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _parts(tree: Any) -> Iterator[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer and, of a sequence, its parts."""
    if isinstance(tree, Mapping):
        yield tree
        for key in ("normalizers", "pretokenizers"):
            for part in tree.get(key, ()):
                yield from _parts(part)
