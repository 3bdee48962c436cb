"""SentencePiece vocabularies: tokenizer.model as it is, and scores from the order of merges."""

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_qlora.exchange.gguf_sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    Piece,
    looks_special,
    read_pieces,
    scores_from_merges,
    type_of,
)


def varint(number):
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def piece(text, score, kind):
    raw = text.encode()
    inner = b"\x0a" + varint(len(raw)) + raw + b"\x15" + struct.pack("<f", score)
    inner += b"\x18" + varint(kind) if kind != NORMAL else b""
    return b"\x0a" + varint(len(inner)) + inner


PIECES = [Piece("<unk>", 0.0, UNKNOWN), Piece("<s>", 0.0, CONTROL), Piece("▁" + "a" * 200, -2.5, NORMAL)]
MODEL = b"".join(piece(own.text, own.score, own.type) for own in PIECES) + b"\x12\x02\x08\x01\x19" + bytes(8)


def test_pieces_are_read_with_their_scores_and_types(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(MODEL)
    assert read_pieces(tmp_path / "tokenizer.model") == PIECES


@given(st.integers(0, len(MODEL) - 1), st.integers(0, 255))
def test_a_damaged_model_is_a_value_error_and_nothing_else(tmp_path_factory, at, byte):
    path = tmp_path_factory.mktemp("damaged") / "tokenizer.model"
    for raw in (MODEL[:at], MODEL[:at] + bytes([byte]) + MODEL[at + 1 :]):
        path.write_bytes(raw)
        try:
            assert read_pieces(path)
        except ValueError:
            pass


def test_merges_that_name_every_way_to_make_a_token_are_scores():
    vocab = {text: index for index, text in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
    assert scores_from_merges(vocab, merges) == {"ab": 0.0, "bc": -1.0, "abc": -2.0}


def test_merges_that_sentencepiece_would_not_make_are_refused():
    vocab = {text: index for index, text in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    with pytest.raises(ValueError, match="'a' and 'bc' make 'abc'"):
        scores_from_merges(vocab, [("a", "b"), ("b", "c"), ("ab", "c")])


def test_tokens_whose_merges_are_mixed_have_equal_scores():
    vocab = {text: index for index, text in enumerate(["x", "_", "__", "___", "____", "x_"])}
    merges = [("_", "_"), ("_", "__"), ("__", "__"), ("_", "___"), ("__", "_"), ("___", "_"), ("x", "_")]
    assert scores_from_merges(vocab, merges) == {"__": 0.0, "___": -1.0, "____": -1.0, "x_": -6.0}


def test_bytes_and_control_tokens_are_known_by_their_spelling():
    assert (type_of("<0x0A>"), type_of("<0x0a>"), type_of("the")) == (BYTE, NORMAL, NORMAL)
    assert all(map(looks_special, ["<|end|>", "<pad>", "<unused7>"]))
    assert not looks_special("<tool>")


@pytest.mark.parametrize("name", ["stories260k/hf", "tokenizers/mistral-v1"])
def test_the_merges_of_real_models_are_in_the_order_of_their_scores(material, name):
    model = json.loads((material / name / "tokenizer.json").read_text())["model"]
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    real = {own.text: own.score for own in read_pieces(material / name / "tokenizer.model")}
    scores = scores_from_merges(model["vocab"], merges)
    by_rank = sorted(scores, key=lambda text: -scores[text])
    assert len(by_rank) > 100
    assert by_rank == sorted(by_rank, key=lambda text: -real[text])
