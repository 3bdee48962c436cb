"""dataset/encoding.py and dataset/render.py"""

from itertools import groupby
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_qlora.config import DataConfig
from mlx_qlora.dataset import (
    DEFAULT_CHAT_TEMPLATE,
    Record,
    ensure_chat_template,
    render,
    render_prompt,
    template_hash,
    template_of,
)
from mlx_qlora.dataset.encoding import encoder_of, inner_of
from mlx_qlora.dataset.render import Rendered, has_system_role, stop_tokens, truncated
from mlx_qlora.dataset.rows import BadRow
from tests.chat_tokenizers import NAMES, shared_tokenizer, tokenizer_named

ASSISTANT_ONLY, ALL = DataConfig(), DataConfig(loss_on="all")
quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(params=[(name, wrapped) for name in NAMES for wrapped in (False, True)], ids=str)
def tokenizer(request) -> Any:
    name, wrapped = request.param
    return shared_tokenizer(name, wrapped=wrapped)


def talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant in turn, after a system turn if one is given."""
    turns = [{"role": "system", "content": system}] if system is not None else []
    roles = ("user", "assistant")
    return turns + [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def rendered(tokenizer: Any, messages: list[dict[str, str]], config: DataConfig = ASSISTANT_ONLY) -> Rendered:
    return render(tokenizer, Record("f:1", tuple(messages)), config)


def target_texts(tokenizer: Any, row: Rendered) -> list[str]:
    """What each run of targets says."""
    runs = groupby(zip(row.tokens, row.targets, strict=True), key=lambda pair: pair[1])
    return [
        inner_of(tokenizer).decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        for is_target, run in runs
        if is_target
    ]


def as_transformers_does(
    tokenizer: Any, messages: list[dict[str, str]], *, prompt: bool = False
) -> list[int]:
    inner = inner_of(tokenizer)
    return list(inner.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False))


def end_of_turn(tokenizer: Any) -> str:
    return inner_of(tokenizer).eos_token


CONVERSATIONS = [
    talk("Em que ano foi fundado o Valbruma?", "O clube foi fundado em 1926."),
    talk("Olá!", "Olá, tudo bem? 😀", "E a partida?", "O clube venceu.", "Obrigado", "De nada"),
    talk("Liste:", "- um\n- dois\n\n```python\nx  =  1\n```"),
]


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["two turns", "six turns", "lines"])
def test_tokens_are_those_that_transformers_gives(tokenizer, messages):
    assert rendered(tokenizer, messages).tokens == as_transformers_does(tokenizer, messages)
    asked = messages[:-1]
    assert render_prompt(tokenizer, asked) == as_transformers_does(tokenizer, asked, prompt=True)


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["two turns", "six turns", "lines"])
def test_each_answer_is_a_target_through_the_token_that_ends_it_and_nothing_else_is(tokenizer, messages):
    row = rendered(tokenizer, messages)
    answers = [turn["content"] + end_of_turn(tokenizer) for turn in messages if turn["role"] == "assistant"]
    assert [text.strip(" ") for text in target_texts(tokenizer, row)] == answers
    stops = stop_tokens(tokenizer)
    learned = [token for token, hit in zip(row.tokens, row.targets, strict=True) if hit and token in stops]
    assert learned == [inner_of(tokenizer).eos_token_id] * len(answers)


def test_every_token_is_a_target_where_the_loss_is_on_all(tokenizer):
    messages = CONVERSATIONS[1]
    row = rendered(tokenizer, messages, ALL)
    assert row.tokens == as_transformers_does(tokenizer, messages)
    assert all(row.targets)


WORDS = st.sampled_from(
    [
        "Olá",
        "não",
        "é",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "1926",
        ".",
        "?",
        ":",
        "(",
        "…",
        "😀",
        "👩‍👩‍👧",
        "日本",
        "\u00a0",
        "\u2028",
    ]
)
TEXT = st.one_of(
    st.lists(WORDS, min_size=1, max_size=8).map("".join),
    st.text(st.characters(exclude_categories=["Cs", "Cn"], exclude_characters="\x00"), max_size=12),
).filter(str.strip)


@quick
@given(contents=st.lists(TEXT, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_is_how_the_training_example_begins_whatever_is_said(name, contents):
    tokenizer = shared_tokenizer(name)
    row = rendered(tokenizer, talk(*contents))
    prompt = render_prompt(tokenizer, talk(*contents[:-1]))
    assert row.tokens[: len(prompt)] == prompt
    assert row.targets[len(prompt)]


@quick
@given(contents=st.lists(TEXT, min_size=2, max_size=4).filter(lambda texts: len(texts) % 2 == 0))
@pytest.mark.parametrize("name", ["chatml", "llama3", "demo"])
def test_no_letter_is_lost_and_targets_are_the_answers_whatever_is_said(name, contents):
    tokenizer = shared_tokenizer(name)
    row = rendered(tokenizer, talk(*contents))
    whole = inner_of(tokenizer).apply_chat_template(talk(*contents), tokenize=False)
    assert tokenizer.decode(row.tokens, clean_up_tokenization_spaces=False) == as_read(tokenizer, whole)
    answers = [text.strip() if name == "llama3" else text for text in contents[1::2]]
    ends = end_of_turn(tokenizer)
    assert target_texts(tokenizer, row) == [as_read(tokenizer, answer) + ends for answer in answers]


def as_read(tokenizer: Any, text: str) -> str:
    """A text as the tokenizer reads it: some bring letters into one normal form first."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer.normalize_str(text) if normalizer else text


@quick
@given(contents=st.lists(TEXT, min_size=2, max_size=4).filter(lambda texts: len(texts) % 2 == 0))
@pytest.mark.parametrize("name", ["chatml", "llama3", "demo"])
def test_where_a_turn_begins_after_a_control_token_tokens_are_always_those_of_transformers(name, contents):
    """A control token cannot join letters; Llama 3 writes a line break after its header, which can."""
    tokenizer = shared_tokenizer(name)
    messages = talk(*contents)
    if name != "demo":
        contents = [text.strip() or "a" for text in contents]
        messages = talk(*contents)
    assert rendered(tokenizer, messages).tokens == as_transformers_does(tokenizer, messages)


def test_letters_that_a_tokenizer_would_join_across_the_prompts_end_are_kept_apart():
    """The rule where a merge crosses: the answer begins anew, so that the prompt is what inference sees."""
    tokenizer = tokenizer_named("demo")
    inner_of(
        tokenizer
    ).chat_template = "{{ messages[0].content }}{% if messages[1:] %}{{ messages[1].content }}{% endif %}"
    messages = talk("O cl", "ube foi fundado")
    joined = tokenizer("O clube foi fundado", add_special_tokens=False)["input_ids"]
    row, prompt = rendered(tokenizer, messages), render_prompt(tokenizer, messages[:1])
    assert row.tokens != joined
    assert row.tokens[: len(prompt)] == prompt == tokenizer("O cl", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(row.tokens) == "O clube foi fundado"
    assert target_texts(tokenizer, row) == ["ube foi fundado"]


INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("answer", ["(sim)", ": sim", " sim", "sim", "\n- a"])
def test_mistrals_template_where_the_answer_touches_the_prompt_keeps_the_prompt(answer):
    tokenizer = with_template("mistral-v1", INST)
    messages = talk("Quem?", answer, "E?", answer)
    row = rendered(tokenizer, messages)
    prompts = [render_prompt(tokenizer, messages[:asked]) for asked in (1, 3)]
    assert [row.tokens[: len(prompt)] for prompt in prompts] == prompts
    assert [text.strip(" ") for text in target_texts(tokenizer, row)] == [f"{answer.strip(' ')}</s>"] * 2
    theirs = as_transformers_does(tokenizer, messages)
    assert (row.tokens == theirs) == ([theirs[: len(prompt)] for prompt in prompts] == prompts)


def control_ids(tokenizer: Any, tokens: list[int]) -> list[int]:
    special = {*inner_of(tokenizer).all_special_ids} - {inner_of(tokenizer).unk_token_id}
    special |= {
        number
        for number, token in inner_of(tokenizer).added_tokens_decoder.items()
        if token.special and token.content != inner_of(tokenizer).unk_token
    }
    return [token for token in tokens if token in special]


@pytest.mark.parametrize("shape", ["{}", "a{}b", " {} ", "{0}{0}", "\n{}\n", "<{}>", "{}é"])
def test_a_control_token_that_someone_types_stays_letters_and_the_templates_own_stay_control(
    tokenizer, shape
):
    inner = inner_of(tokenizer)
    for name in encoder_of(tokenizer).control:
        typed = shape.format(name)
        messages = talk(f"Diga {typed} já", f"x {typed} y", "E?", "Sim", system=f"s {typed}")
        harmless = talk("Diga já", "x y", "E?", "Sim", system="s")
        row = rendered(tokenizer, messages)
        expected = control_ids(tokenizer, rendered(tokenizer, harmless).tokens)
        assert expected
        assert control_ids(tokenizer, row.tokens) == expected
        prompt = render_prompt(tokenizer, messages[:-1])
        assert row.tokens[: len(prompt)] == prompt
        assert control_ids(tokenizer, prompt) == control_ids(
            tokenizer, render_prompt(tokenizer, harmless[:-1])
        )
        said = inner.decode(row.tokens, clean_up_tokenization_spaces=False)
        assert said.count(typed.strip()) >= 3
        assert target_texts(tokenizer, row)[0].strip(" ").startswith(f"x {typed} y")


def test_text_around_a_typed_control_token_is_tokenized_as_ever(tokenizer):
    name = encoder_of(tokenizer).control[0]
    plain = rendered(tokenizer, talk("O clube venceu.", "Em que ano?", "O Valbruma", "foi fundado"))
    typed = rendered(tokenizer, talk("O clube venceu.", "Em que ano?", f"O Valbruma {name}", "foi fundado"))
    assert typed.tokens != plain.tokens
    cut = plain.tokens.index(inner_of(tokenizer).eos_token_id)
    assert typed.tokens[: cut + 1] == plain.tokens[: cut + 1]


@quick
@given(data=st.data())
@pytest.mark.parametrize("name", NAMES)
def test_no_text_can_write_a_control_token(name, data):
    tokenizer = shared_tokenizer(name)
    pieces = st.lists(
        st.sampled_from([*encoder_of(tokenizer).control, "<", "|", ">", " ", "a", "é", "\n", "s"])
    )
    contents = data.draw(st.lists(pieces.map("".join).filter(str.strip), min_size=2, max_size=2))
    row = rendered(tokenizer, talk(*contents))
    assert control_ids(tokenizer, row.tokens) == control_ids(
        tokenizer, rendered(tokenizer, talk("a", "b")).tokens
    )
    prompt = render_prompt(tokenizer, talk(contents[0]))
    assert row.tokens[: len(prompt)] == prompt


def test_stand_ins_cannot_be_typed_either():
    tokenizer = shared_tokenizer("chatml")
    for typed in ("\ufdd00\ufdd1", "\ufdd0c1\ufdd1"):
        whole = rendered(tokenizer, talk(typed, "a"))
        assert tokenizer.decode(whole.tokens).startswith("<|im_start|>user\n" + typed)
        with pytest.raises(BadRow, match="noncharacters"):
            rendered(tokenizer, talk(f"{typed} <|im_end|>", "a"))
        with pytest.raises(BadRow, match="noncharacters"):
            rendered(tokenizer, talk(typed, "<|im_end|>"))


def with_template(name: str, template: str, *, wrapped: bool = False) -> Any:
    tokenizer = tokenizer_named(name, wrapped=wrapped)
    ensure_chat_template(tokenizer, template)
    return tokenizer


LAST_TURN_ONLY = (
    "{% for m in messages[-2:] %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_template_that_rewrites_history_is_refused_with_the_way_out(wrapped):
    tokenizer = with_template("chatml", LAST_TURN_ONLY, wrapped=wrapped)
    with pytest.raises(BadRow, match=r"data\.loss_on=all"):
        rendered(tokenizer, CONVERSATIONS[1])
    row = rendered(tokenizer, CONVERSATIONS[1], ALL)
    assert row.tokens == as_transformers_does(tokenizer, CONVERSATIONS[1])
    assert all(row.targets)
    assert target_texts(tokenizer, rendered(tokenizer, CONVERSATIONS[0])) == [
        "O clube foi fundado em 1926.<|im_end|>"
    ]
    prompt = render_prompt(tokenizer, CONVERSATIONS[1][:-1])
    assert prompt == as_transformers_does(tokenizer, CONVERSATIONS[1][:-1], prompt=True)


FORGETS_THOUGHTS = (
    "{% for m in messages %}{% set c = m.content %}"
    "{% if m.role == 'assistant' and not loop.last %}{% set c = c.split('</think>')[-1].strip() %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_earlier_answers_whose_thoughts_the_template_forgets_are_not_learned_from_wrongly():
    tokenizer = with_template("chatml", FORGETS_THOUGHTS)
    plain = talk("1", "dois", "3", "<think>hm</think>quatro")
    assert target_texts(tokenizer, rendered(tokenizer, plain)) == [
        "dois<|im_end|>",
        "<think>hm</think>quatro<|im_end|>",
    ]
    with pytest.raises(BadRow, match=r"data\.loss_on=all"):
        rendered(tokenizer, talk("1", "<think>hm</think>dois", "3", "quatro"))


EACH_TURN = LAST_TURN_ONLY.replace("messages[-2:]", "messages")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + EACH_TURN


def test_a_system_turn_that_the_template_refuses_goes_before_the_first_question():
    tokenizer = with_template("chatml", NO_SYSTEM)
    assert not has_system_role(tokenizer)
    spoken = talk("Quem?", "Eu.", "E?", "Ela.", system="Seja breve.")
    merged = talk("Seja breve.\n\nQuem?", "Eu.", "E?", "Ela.")
    want = as_transformers_does(tokenizer, merged)
    assert rendered(tokenizer, spoken).tokens == want
    by_config = DataConfig(system_prompt="Seja breve.")
    assert rendered(tokenizer, spoken[1:], by_config).tokens == want
    asked = as_transformers_does(tokenizer, merged[:1], prompt=True)
    assert render_prompt(tokenizer, talk("Quem?"), "Seja breve.") == asked
    assert render_prompt(tokenizer, talk("Quem?", system="Seja breve.")) == asked


def test_a_system_turn_that_the_template_leaves_out_is_noticed():
    hides = EACH_TURN.replace("in messages", "in messages if m.role != 'system'")
    tokenizer = with_template("chatml", hides)
    assert not has_system_role(tokenizer)
    row = rendered(tokenizer, talk("Quem?", "Eu.", system="Seja breve."))
    assert "user\nSeja breve.\n\nQuem?<" in tokenizer.decode(row.tokens)


def test_the_configured_system_prompt_is_used_where_a_row_has_none(tokenizer):
    config = DataConfig(system_prompt="Seja breve.")
    want = rendered(tokenizer, talk("Quem?", "Eu.", system="Seja breve.")).tokens
    assert rendered(tokenizer, talk("Quem?", "Eu."), config).tokens == want
    own = talk("Quem?", "Eu.", system="Outro.")
    assert rendered(tokenizer, own, config).tokens == rendered(tokenizer, own).tokens != want


def test_a_conversation_that_the_template_refuses_is_a_bad_row_with_its_reason():
    strict = "{% if messages|length > 2 %}{{ raise_exception('two turns only') }}{% endif %}" + LAST_TURN_ONLY
    tokenizer = with_template("chatml", strict)
    with pytest.raises(BadRow, match="two turns only"):
        rendered(tokenizer, CONVERSATIONS[1])
    with pytest.raises(BadRow, match="refuses it"):
        rendered(with_template("chatml", "{{ messages[0].content + 1 }}"), CONVERSATIONS[0])


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("name", "begins"), [("mistral-v1", True), ("stories260k", True), ("demo", False), ("llama3", True)]
)
def test_a_tokenizer_without_a_template_gets_the_default_with_bos_only_if_it_adds_one(name, begins, wrapped):
    tokenizer = tokenizer_named(name, wrapped=wrapped)
    inner_of(tokenizer).chat_template = None
    if wrapped:
        tokenizer = TokenizerWrapper(inner_of(tokenizer))
    template = ensure_chat_template(tokenizer)
    assert template == template_of(tokenizer) == ("{{ bos_token }}" if begins else "") + DEFAULT_CHAT_TEMPLATE
    row = rendered(tokenizer, talk("Oi", "Olá", "E?", "Sim"))
    eos = end_of_turn(tokenizer)
    assert [text.strip(" ") for text in target_texts(tokenizer, row)] == [f"Olá{eos}", f"Sim{eos}"]
    if begins:
        assert row.tokens.count(inner_of(tokenizer).bos_token_id) == 1
        assert row.tokens[0] == inner_of(tokenizer).bos_token_id


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_template_is_kept_unless_another_is_given_and_its_hash_tells_them_apart(wrapped):
    tokenizer = tokenizer_named("chatml", wrapped=wrapped)
    own = template_of(tokenizer)
    assert ensure_chat_template(tokenizer) == own
    before = template_hash(tokenizer)
    assert ensure_chat_template(tokenizer, LAST_TURN_ONLY) == LAST_TURN_ONLY == template_of(tokenizer)
    assert ensure_chat_template(tokenizer) == LAST_TURN_ONLY
    assert template_hash(tokenizer) != before
    ensure_chat_template(tokenizer, own)
    assert template_hash(tokenizer) == before


@pytest.mark.parametrize("name", NAMES)
def test_the_wrapped_tokenizer_gives_what_the_plain_one_gives(name):
    plain, wrapped = (shared_tokenizer(name, wrapped=wrapped) for wrapped in (False, True))
    for messages in [*CONVERSATIONS, talk("Oi", "</s> <|im_end|> <|end|>")]:
        assert rendered(plain, messages) == rendered(wrapped, messages)


def test_plain_text_is_learned_whole_with_one_bos_and_one_eos(tokenizer):
    inner = inner_of(tokenizer)
    eos, bos = inner.eos_token, inner.bos_token or ""
    texts = [
        "O clube venceu.",
        "O clube venceu." + eos,
        bos + "O clube venceu.",
        bos + "O clube venceu." + eos,
    ]
    begins = inner("a")["input_ids"][0] == inner.bos_token_id
    for text in texts:
        row = render(tokenizer, Record("f:1", text=text), ASSISTANT_ONLY)
        assert all(row.targets)
        assert row.tokens.count(inner.eos_token_id) == 1
        assert row.tokens[-1] == inner.eos_token_id
        assert row.tokens.count(inner.bos_token_id) == begins
        assert inner.decode(row.tokens, skip_special_tokens=True).strip() == "O clube venceu."


def test_stop_tokens_are_eos_first_and_those_that_the_model_names(tokenizer):
    assert stop_tokens(tokenizer) == [inner_of(tokenizer).eos_token_id]
    if tokenizer is not inner_of(tokenizer):
        fresh = tokenizer_named("chatml", wrapped=True)
        fresh.add_eos_token("<|endoftext|>")
        assert stop_tokens(fresh) == [fresh.eos_token_id, fresh.convert_tokens_to_ids("<|endoftext|>")]


def test_wherever_a_conversation_is_cut_it_ends_in_a_learned_eos_after_words_or_teaches_nothing():
    tokenizer = shared_tokenizer("chatml")
    whole = rendered(
        tokenizer, talk("Quem venceu a partida?", "O clube.", "Em que ano foi isso?", "Em 1926.")
    )
    eos, first = tokenizer.eos_token_id, whole.targets.index(True)
    for limit in range(2, len(whole.tokens)):
        row = truncated(whole, DataConfig(max_seq_length=limit), [eos], "f:1")
        kept, mask = len(row.tokens), row.targets_mask.tolist()
        assert kept <= limit
        if limit <= first + 1:  # there is no room for a word and EOS
            assert not any(mask)
            continue
        assert row.tokens[-1] == eos
        assert mask[-2:] == [True, True]
        assert row.tokens[:-1].tolist() == whole.tokens[: kept - 1]
        assert mask == whole.targets[:kept]
        # Nothing is cut off that could be learned: only a word after which there is no room for EOS.
        assert not any(whole.targets[kept : limit - 1])
