"""Scores and types of a SentencePiece vocabulary, from tokenizer.model or from the order of merges."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens; SentencePiece's numbers and GGUF's are the same."""

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_PIECES, _PIECE, _SCORE, _TYPE = 1, 1, 2, 3
_LEAST = -1e6


@dataclass(frozen=True)
class Piece:
    """One token of a SentencePiece model."""

    text: str
    score: float
    type: int


def read_pieces(path: Path) -> list[Piece]:
    """The vocabulary in a tokenizer.model.

    Raises:
        ValueError: it is no SentencePiece model.

    Source: google/sentencepiece, src/sentencepiece_model.proto.
    """
    pieces = []
    for number, value in _fields(path.read_bytes()):
        if number == _PIECES and isinstance(value, bytes):
            own = dict(_fields(value))
            text, score = own.get(_PIECE, b""), own.get(_SCORE, b"\0\0\0\0")
            kind = own.get(_TYPE, NORMAL)
            if not isinstance(text, bytes) or not isinstance(score, bytes) or not isinstance(kind, int):
                raise ValueError("a piece is of the wrong form")
            pieces.append(Piece(text.decode(), struct.unpack("<f", score)[0], kind))
    if not pieces:
        raise ValueError("there are no pieces")
    return pieces


def _fields(raw: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Fields of a protobuf message: number, and bytes (or a fixed number's bytes) or an integer."""
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        kind = tag & 7
        if kind == 0:
            number, at = _varint(raw, at)
            yield tag >> 3, number
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"an unknown kind of field, {kind}")
        length, at = _varint(raw, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        if at + length > len(raw):
            raise ValueError("it is truncated")
        yield tag >> 3, raw[at : at + length]
        at += length


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(raw) and shift < 64:
        value |= (raw[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if raw[at - 1] < 128:
            return value, at
    raise ValueError("it is truncated")


def scores_from_merges(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> dict[str, float]:
    """A score for each token that merges make: minus the rank of its first merge.

    SentencePiece joins the two neighbours whose whole has the highest score. That is what a list of merges
    says if every way to put a token together is in it. Tokens whose merges are mixed had equal scores.

    Raises:
        ValueError: a way is missing; SentencePiece would split text otherwise than these merges.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
        last[left + right] = rank
    there = set(merges)
    scores: dict[str, float] = {}
    score, end = 0, -1
    for token, rank in first.items():
        if rank > end:
            score = rank
        end = max(end, last[token])
        scores[token] = -float(score)
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab and (left, right) not in there:
                raise ValueError(f"{left!r} and {right!r} make {token!r}, which no merge says")
    return scores


def type_of(text: str) -> int:
    """The type of a token that is not special."""
    return BYTE if _BYTE_TOKEN.fullmatch(text) else NORMAL


def looks_special(text: str) -> bool:
    """llama.cpp's converter takes these for control tokens, whatever the tokenizer says."""
    if text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]"):
        return True
    brackets = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return any(text.startswith(begin) and text.endswith(end) for begin, end in brackets)
