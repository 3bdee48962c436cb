"""dataset/prompt_template.py, and data.prompt_template from the configuration to the adapter's tokens"""

from copy import copy
from functools import cache
from importlib import import_module

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_qlora.config import DataConfig, build_config
from mlx_qlora.dataset import (
    Record,
    ensure_chat_template,
    ensure_prompt_template,
    load_dataset,
    render,
    render_prompt,
    template_of,
)
from mlx_qlora.dataset.encoding import inner_of
from mlx_qlora.dataset.prompt_template import chat_template_of
from mlx_qlora.errors import ConfigError
from tests.chat_tokenizers import NAMES, shared_tokenizer, tokenizer_named

WORDS = "### Pergunta:\n{question}\n### Resposta:\n{answer}"
TEMPLATES = [
    WORDS,
    "P: {question}\nR: {answer}",
    "<<{system}>>\n\nQ: {question}\nA:",
    "{question} => {answer} ###\n\n",
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
]
quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
PLAIN = st.text(st.characters(exclude_categories=["Cs", "Cn", "Cc"]), min_size=1, max_size=12).filter(
    str.strip
)


@cache
def loaded(name: str, process: str):  # noqa: ARG001
    """A tokenizer that tests give templates to; `process` tells two of the same name apart."""
    tokenizer = copy(shared_tokenizer(name, wrapped=True))
    tokenizer._tokenizer = copy(inner_of(tokenizer))
    return tokenizer


def talk(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def with_template(name: str, template: str, **config: object):
    data = DataConfig(prompt_template=template, **config)
    tokenizer = loaded(name, "training")
    ensure_prompt_template(tokenizer, data)
    return tokenizer, data


def text_of(tokenizer, tokens: list[int]) -> str:
    return inner_of(tokenizer).decode(tokens, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", NAMES)
def test_what_the_adapter_stores_gives_inference_the_tokens_training_began_with(name, template):
    tokenizer, data = with_template(name, template, system_prompt="Seja breve.")
    stored = template_of(tokenizer)
    answering = loaded(name, "inference")  # only the adapter's text comes along
    ensure_chat_template(answering, stored)
    for contents in (("Quem venceu?", "Nós."), ("a", "b", " c\n", "  d"), ("<s>[INST]", "</s>")):
        turns = talk(*contents)
        row = render(tokenizer, Record("f:1", tuple(turns)), data)
        for last in range(1, len(turns), 2):
            prompt = render_prompt(answering, turns[:last], data.system_prompt)
            assert row.tokens[: len(prompt)] == prompt
            assert row.targets[len(prompt)]


@quick
@given(parts=st.tuples(PLAIN, PLAIN, PLAIN), question=PLAIN, answer=PLAIN)
def test_words_of_any_kind_stand_around_question_and_answer_as_they_were_written(parts, question, answer):
    before, between, after = (part.replace("{", "(").replace("}", ")") for part in parts)
    tokenizer = inner_of(loaded("chatml", "training"))
    template = f"{before}{{question}}{between}{{answer}}{after}"
    tokenizer.chat_template = chat_template_of(template, tokenizer)
    shown = tokenizer.apply_chat_template(talk(question, answer), tokenize=False)
    assert shown == f"{before}{question}{between}{answer}{after.rstrip()}<|im_end|>"


def test_the_words_are_laid_out_as_they_read_and_the_answer_ends_in_eos():
    tokenizer, data = with_template("chatml", WORDS, system_prompt="Seja breve.")
    row = render(tokenizer, Record("f:1", tuple(talk("Quem?", "Nós.", "E eu?", "Não."))), data)
    assert text_of(tokenizer, row.tokens) == (
        "Seja breve.\n\n### Pergunta:\nQuem?\n### Resposta:\nNós.<|im_end|>\n"
        "### Pergunta:\nE eu?\n### Resposta:\nNão.<|im_end|>"
    )
    learned = [t for t, hit in zip(row.tokens, row.targets, strict=True) if hit]
    assert text_of(tokenizer, learned) == "Nós.<|im_end|>Não.<|im_end|>"


def test_a_place_for_the_system_prompt_is_written_once():
    tokenizer, data = with_template("chatml", "<<{system}>>\n\nQ: {question}\nA: {answer}", system_prompt="S")
    row = render(tokenizer, Record("f:1", tuple(talk("a", "b", "c", "d"))), data)
    assert text_of(tokenizer, row.tokens) == "<<S>>\n\nQ: a\nA: b<|im_end|>\nQ: c\nA: d<|im_end|>"
    tokenizer, data = with_template("chatml", "<<{system}>>\n\nQ: {question}\nA: {answer}")
    row = render(tokenizer, Record("f:1", tuple(talk("a", "b"))), data)
    assert text_of(tokenizer, row.tokens) == "Q: a\nA: b<|im_end|>"


def test_spaces_before_the_answer_are_learned_with_it():
    tokenizer, _ = with_template("chatml", "Q: {question}\nA: {answer}")
    assert text_of(tokenizer, render_prompt(tokenizer, talk("a"))) == "Q: a\nA:"


def test_bos_and_eos_are_written_once_where_the_template_writes_them_too():
    tokenizer, data = with_template("llama3", "<|begin_of_text|>Q {question} A {answer}<|eot_id|>")
    row = render(tokenizer, Record("f:1", tuple(talk("a", "b"))), data)
    assert text_of(tokenizer, row.tokens) == "<|begin_of_text|>Q a A b<|eot_id|>"
    tokenizer, data = with_template("llama3", "Q {question} A {answer}")
    row = render(tokenizer, Record("f:1", tuple(talk("a", "b"))), data)
    assert text_of(tokenizer, row.tokens) == "<|begin_of_text|>Q a A b<|eot_id|>"


def test_a_shells_backslash_n_is_a_new_line():
    tokenizer, _ = with_template("chatml", r"Q: {question}\nA: {answer}")
    assert text_of(tokenizer, render_prompt(tokenizer, talk("a"))) == "Q: a\nA:"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{pergunta} {answer}", "{pergunta} is no place"),
        ("### {answer}\n", "has no {question}"),
        ("{answer} {question}\n", "in this order"),
        ("{question} {question} {answer}", "once"),
        ("{question}{answer}", "nothing stands between"),
        ("{question}", "nothing stands between"),
        ("{% for m in messages %}", "broken"),
        ("{{ 'a' * 9 }}{{ messages }}", "a string times a number"),
        ("{{ messages[0]['content'] }}\n", "leaves out the answer"),
        ("{% if messages[1] %}{{ messages[1]['content'] }}{% endif %}", "leaves out the question"),
        ("{{ raise_exception('no') }}", "refuses"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_with_the_reason(template, why):
    with pytest.raises(ConfigError, match=r"data\.prompt_template") as caught:
        with_template("chatml", template)
    assert why in str(caught.value)


def test_a_template_without_end_is_stopped(monkeypatch):
    module = import_module("mlx_qlora.dataset.render")
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    limit = module.time_limit
    monkeypatch.setattr(module, "time_limit", lambda: limit(0.3))
    with pytest.raises(ConfigError, match="ran for more than"):
        with_template("chatml", endless)


def test_a_file_is_read_once_and_its_text_is_what_the_configuration_holds(tmp_path):
    file = tmp_path / "template.txt"
    file.write_text(WORDS + "\n", encoding="utf-8")
    config = build_config({"data": {"prompt_template": str(file)}})
    assert config.data.prompt_template == WORDS
    file.unlink()
    assert build_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b"x" * (2**20 + 2)])
def test_a_file_that_cannot_be_read_is_refused_with_the_key(tmp_path, content):
    if content is not None:
        (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"data\.prompt_template"):
        build_config({"data": {"prompt_template": str(tmp_path / "t.txt")}})


def test_a_run_says_which_template_it_uses(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 2)
    told = {}
    for name, template in (("chatml", WORDS), ("chatml", None), ("demo", None)):
        config = DataConfig(path=str(tmp_path / "rows.jsonl"), prompt_template=template)
        dataset = load_dataset(config, tokenizer_named(name), seed=0)
        told[name, template] = [note for note in dataset.report.notes if "template" in note]
    assert told["chatml", WORDS] == [
        "prompts are written by data.prompt_template, in place of the model's own chat template"
    ]
    assert told["chatml", None] == []


def test_evaluation_renders_rows_as_training_did(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "Quem?", "answer": "Nós."}\n')
    trained = load_dataset(
        DataConfig(path=str(rows), prompt_template=WORDS, valid_fraction=0),
        loaded("chatml", "training"),
        seed=0,
    )
    evaluating = loaded("chatml", "inference")
    ensure_chat_template(evaluating, template_of(loaded("chatml", "training")))
    evaluated = load_dataset(DataConfig(path=str(rows), valid_fraction=0), evaluating, seed=0)
    assert evaluated.train[0].tokens.tolist() == trained.train[0].tokens.tolist()
    assert evaluated.train[0].targets_mask.tolist() == trained.train[0].targets_mask.tolist()
