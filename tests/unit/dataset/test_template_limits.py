"""dataset/template_limits.py: a chat template is somebody's program."""

import sys
import threading
import time

import pytest

from mlx_qlora.dataset.render import DEFAULT_CHAT_TEMPLATE, render_prompt
from mlx_qlora.dataset.template_limits import check_template, time_limit
from mlx_qlora.errors import ModelError
from tests.conftest import CHATML, save_tokenizer

QUESTION = [{"role": "user", "content": "quem?"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from mlx_lm.utils import load_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ 'x' * 3 }}", "a string times a number"),
        ("{{ 3 * 'x' }}", "a string times a number"),
        ("{{ 10 ** 3 }}", "a power"),
        ("{% for i in range(10000000) %}x{% endfor %}", "the number 10000000"),
        ("{{ 'x' | center(9) }}", "the filter center"),
        ("{{ bos_token", "is broken"),
        ("{% for %}", "is broken"),
        ("x" * 2_000_000, "larger than 1 MiB"),
    ],
)
def test_what_no_template_needs_is_refused_before_it_runs(template, says):
    with pytest.raises(ModelError, match=says):
        check_template(template)


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        DEFAULT_CHAT_TEMPLATE,
        "{%- set ns = namespace(last=messages|length - 1) %}{% for m in messages[::-1] %}"
        "{% set i = (messages|length - 1) - loop.index0 %}{% if i % 2 != 0 %}{% continue %}{% endif %}"
        "{{ m.content | trim ~ m['role'] }}{% endfor %}",
        "{% if tools %}{{ tools | tojson(indent=4) | indent(2) }}{% endif %}{{ strftime_now('%d %b') }}",
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('no') }}{% endif %}",
        "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}",
    ],
)
def test_what_real_templates_do_passes(template):
    check_template(template)


def test_a_template_that_loops_is_stopped_and_the_thread_goes_on(tokenizer, monkeypatch):
    monkeypatch.setattr(sys.modules["mlx_qlora.dataset.render"], "time_limit", lambda: time_limit(0.3))
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = b %}{% endfor %}{% endfor %}x"
    tokenizer._tokenizer.chat_template = endless
    started = time.monotonic()
    with pytest.raises(ModelError, match=r"more than 0\.3 seconds"):
        render_prompt(tokenizer, QUESTION)
    assert time.monotonic() - started < 5
    tokenizer._tokenizer.chat_template = CHATML
    assert render_prompt(tokenizer, QUESTION)


def test_a_template_that_doubles_its_text_is_stopped_long_before_it_fills_the_machine(tokenizer):
    doubling = (
        "{% set x = namespace(v='xx') %}{% for i in range(40) %}{% for j in range(3000) %}{% endfor %}"
        "{% set x.v = x.v ~ x.v %}{% endfor %}{{ x.v | length }}"
    )
    tokenizer._tokenizer.chat_template = doubling
    with pytest.raises(ModelError, match="more than 256 MiB"):
        render_prompt(tokenizer, QUESTION)
    tokenizer._tokenizer.chat_template = CHATML
    assert render_prompt(tokenizer, QUESTION)


def loop_for_ever():
    with time_limit(0.2):
        while True:
            pass


def test_only_the_thread_that_is_late_is_stopped():
    ended = []

    def patient():
        with time_limit(30):
            time.sleep(1.0)
        ended.append("patient")

    other = threading.Thread(target=patient)
    other.start()
    with pytest.raises(ModelError):
        loop_for_ever()
    other.join()
    assert ended == ["patient"]
    with time_limit(0.1):
        pass
    time.sleep(0.5)  # nothing is raised after the end
