"""Where an answer's text ends, and which log-probabilities go with it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.utils import load_tokenizer

from mlx_qlora.serving.engine import TokenLogprob, token_text
from mlx_qlora.serving.jobs import AnswerText, StopText


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_folder):
    return load_tokenizer(tiny_llama_folder)


def until_stop(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The same by trying every end in turn."""
    for end in range(len(text) + 1):
        begins = [end - len(word) for word in stop if text[:end].endswith(word)]
        if begins:
            return text[: min(begins)], True
    return text, False


@given(
    pieces=st.lists(st.text("ab c", max_size=4), max_size=12),
    stop=st.lists(st.text("ab c", min_size=1, max_size=5), max_size=4).map(tuple),
)
def test_a_text_ends_before_the_first_stop_string_however_it_comes_in_pieces(pieces, stop):
    stream, got, is_stopped = StopText(stop), "", False
    for piece in pieces:
        text, is_stopped = stream.add(piece)
        got += text
        assert until_stop("".join(pieces), stop)[0].startswith(got)
        if is_stopped:
            break
    if not is_stopped:
        got += stream.flush()
    assert (got, is_stopped) == until_stop("".join(pieces), stop)


def test_nothing_is_held_that_cannot_become_a_stop_string():
    stream = StopText(("END", "\n\n"))
    assert stream.add("the E") == ("the ", False)
    assert stream.add("N") == ("", False)
    assert stream.add("d") == ("ENd", False)
    assert stream.add("\n") == ("", False)
    assert stream.add("\nmore") == ("", True)


def add_all(text: AnswerText, tokenizer, words: list[str]) -> tuple[str, list[str]]:
    got, entries = "", []
    for word in words:
        (token,) = tokenizer.encode(word)
        piece, logprobs, _ = text.add(token, TokenLogprob(token, word, -1.0, ()))
        got += piece
        entries += [entry.text for entry in logprobs]
    return got, entries


def test_what_the_detokenizer_holds_comes_at_the_end(tokenizer):
    text = AnswerText(tokenizer.detokenizer, (), len(tokenizer))
    assert add_all(text, tokenizer, ["a", "b", " "]) == ("ab", ["a", "b"])
    more, logprobs, is_stopped = text.finish()
    assert (more, [entry.text for entry in logprobs], is_stopped) == (" ", [" "], False)


def test_a_stop_string_that_only_the_end_completes_stops_too_and_its_logprobs_are_not_given(tokenizer):
    text = AnswerText(tokenizer.detokenizer, (" ",), len(tokenizer))
    assert add_all(text, tokenizer, ["a", "b", " "]) == ("ab", ["a", "b"])
    assert text.finish() == ("", (), True)


def test_a_token_that_the_tokenizer_does_not_know_has_no_text(tokenizer):
    text = AnswerText(tokenizer.detokenizer, (), len(tokenizer))
    assert text.add(len(tokenizer) + 5, None) == ("", (), False)
    assert token_text(tokenizer, len(tokenizer) + 5) == ""


def test_a_tokens_text_keeps_its_space_and_marks_part_of_a_character(tokenizer):
    tokens = tokenizer.encode(" o é")
    texts = [token_text(tokenizer, token) for token in tokens]
    assert "".join(texts).startswith(" o ")
    first_byte = tokenizer.encode("😀")[0]
    assert "\ufffd" in token_text(tokenizer, first_byte)
