from typing import Any

import pytest

from mlx_qlora.config import DataConfig
from mlx_qlora.dataset.encoding import Encoder, encoder_of, inner_of
from mlx_qlora.dataset.records import Record
from mlx_qlora.dataset.render import render, render_prompt
from mlx_qlora.dataset.rows import BadRow
from tests.unit.dataset import made


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encoded(tokenizer: Any, template: str, typed: str) -> list[int]:
    """The tokens of a template with a turn's text at ``{}``."""
    encoder = Encoder(tokenizer)
    text = template.replace("{}", encoder.hide(typed))
    return encoder.encode(text, [len(text)], hidden=True)[0]


def test_control_tokens_that_only_the_backend_knows_are_control_tokens():
    tokenizer = made.llama3()
    assert "<|start_header_id|>" not in tokenizer.all_special_tokens
    assert Encoder(tokenizer).spells_control("a <|start_header_id|> b")


def test_added_tokens_that_are_not_special_stay_usable_in_a_turn():
    tokenizer = made.byte_level(made.CHATML, made.CHATML_TOKENS, eos_token="<|im_end|>")
    tokenizer.add_tokens(["<think>"])
    assert not Encoder(tokenizer).spells_control("<think>")
    think = tokenizer.convert_tokens_to_ids("<think>")
    assert think in encoded(tokenizer, "{}", "<think> <|im_end|>")


@pytest.mark.parametrize("make", [made.chatml, made.llama3, made.mistral, made.metaspace])
def test_a_typed_control_token_becomes_letters_and_the_template_s_own_stays(make):
    tokenizer = make()
    name = tokenizer.eos_token
    stop = tokenizer.convert_tokens_to_ids(name)
    tokens = encoded(tokenizer, f"oi {{}} fim{name}", f"o {name} clube")
    assert tokens.count(stop) == 1
    assert tokens[-1] == stop
    assert tokenizer.decode(tokens[:-1]) == f"oi o {name} clube fim"


@pytest.mark.parametrize("make", [made.chatml, made.mistral, made.metaspace])
def test_what_stands_around_a_typed_control_token_is_tokenized_as_ever(make):
    """Through the twin, text without control tokens gets the tokenizer's own tokens."""
    tokenizer = make()
    encoder = Encoder(tokenizer)
    for text in ("o clube venceu", f"o clube{tokenizer.eos_token} venceu o jogo", " oi", "a\nb"):
        assert encoder.encode(text, [len(text)], hidden=True)[0] == ids(tokenizer, text)


def test_a_control_token_typed_at_the_edge_of_a_turn_does_not_join_the_template():
    tokenizer = made.chatml()
    start, end = (tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>"))
    tokens = encoded(tokenizer, "<|im_start|>{}<|im_end|>", "<|im_end|><|im_start|>")
    assert [token for token in tokens if token in (start, end)] == [start, end]
    assert tokens[0] == start
    assert tokens[-1] == end


def test_letters_that_a_vocabulary_only_knows_as_control_are_refused():
    tokenizer = made.unigram(made.TRAILING_SPACE)
    with pytest.raises(BadRow, match="cannot write in any other way"):
        encoded(tokenizer, "Q: {}", "x </s> y")


def test_a_turn_with_the_characters_of_stand_ins_is_refused():
    with pytest.raises(BadRow, match="noncharacters"):
        Encoder(made.chatml()).hide("\ufdd00\ufdd1 <|im_end|>")


def test_a_tokenizer_without_a_fast_form_refuses_only_what_it_cannot_write():
    class Slow:
        all_special_tokens: tuple[str, ...] = ("</s>",)
        unk_token_id = 0

        def __len__(self) -> int:
            return 3

        def convert_tokens_to_ids(self, name: str) -> int:
            return {"</s>": 2}.get(name, 0)

        def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    encoder = Encoder(Slow())
    assert encoder.encode("ab", [1, 2], hidden=False) == ([97, 98], [1, 2])
    with pytest.raises(BadRow, match="no fast form"):
        encoder.encode(encoder.hide("</s>"), [3], hidden=True)


def test_a_prompt_s_tokens_begin_the_tokens_of_the_whole_even_where_letters_would_join():
    tokenizer = made.byte_level(None, made.CHATML_TOKENS, eos_token="<|im_end|>")
    prompt, answer = "[/INST]", "(sim)"
    whole = ids(tokenizer, prompt + answer)
    assert whole[: len(ids(tokenizer, prompt))] != ids(tokenizer, prompt), "the corpus must join them"
    tokens, counts = encoder_of(tokenizer).encode(prompt + answer, [7, 12], hidden=False)
    assert tokens[: counts[0]] == ids(tokenizer, prompt)
    assert tokenizer.decode(tokens) == prompt + answer
    assert counts[1] == len(tokens)


def test_a_continuation_does_not_begin_like_a_sentence_of_its_own():
    tokenizer = made.metaspace()
    encoder = encoder_of(tokenizer)
    tokens, counts = encoder.encode("A: Olá", [3, 6], hidden=False)
    assert tokens[: counts[0]] == ids(tokenizer, "A: ")
    assert tokenizer.decode(tokens) == "A: Olá"


def test_an_encoder_is_made_once_and_again_when_tokens_were_added():
    tokenizer = made.byte_level(made.CHATML, made.CHATML_TOKENS, eos_token="<|im_end|>")
    first = encoder_of(tokenizer)
    assert encoder_of(tokenizer) is first
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    assert encoder_of(tokenizer).spells_control("<|new|>")


def test_the_inner_tokenizer_is_hugging_face_s_with_and_without_mlx_lm_s_wrapper():
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    tokenizer = made.chatml()
    assert inner_of(tokenizer) is tokenizer
    assert inner_of(TokenizerWrapper(tokenizer)) is tokenizer


CONVERSATION = [
    {"role": "user", "content": "Quem venceu o jogo?"},
    {"role": "assistant", "content": "O clube venceu."},
    {"role": "user", "content": "  (e o estádio) "},
    {"role": "assistant", "content": "Olá, sim."},
]


def record_of(messages: list[dict[str, str]]) -> Record:
    return Record("rows.jsonl:1", tuple(messages))


@pytest.mark.parametrize("family", made.FAMILIES)
@pytest.mark.parametrize("typed", ["", " </s> <|im_end|> <|eot_id|> "])
def test_at_every_turn_what_inference_gives_the_model_is_how_the_training_row_begins(family, typed):
    tokenizer = made.FAMILIES[family]()
    messages = [{**message, "content": message["content"] + typed} for message in CONVERSATION]
    whole = render(tokenizer, record_of(messages), DataConfig())
    begins = [at for at in range(1, len(whole.targets)) if whole.targets[at] and not whole.targets[at - 1]]
    prompts = [render_prompt(tokenizer, messages[:turn]) for turn in (1, 3)]
    assert [len(prompt) for prompt in prompts] == begins
    for prompt in prompts:
        assert whole.tokens[: len(prompt)] == prompt


@pytest.mark.parametrize(
    "family", [name for name in made.FAMILIES if name not in ("trailing_space", "metaspace")]
)
def test_where_nothing_joins_the_tokens_are_the_tokenizer_s_own(family):
    tokenizer = made.FAMILIES[family]()
    own = tokenizer.apply_chat_template(CONVERSATION, tokenize=True, return_dict=False)
    assert render(tokenizer, record_of(CONVERSATION), DataConfig()).tokens == own


@pytest.mark.parametrize("family", ["trailing_space", "metaspace"])
def test_where_a_space_would_join_the_answer_the_text_is_still_the_template_s(family):
    tokenizer = made.FAMILIES[family]()
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert tokenizer.decode(render(tokenizer, record_of(CONVERSATION), DataConfig()).tokens) == text
