"""data.prompt_template: words with {question} and {answer}, or Jinja, as a tokenizer's chat template."""

from __future__ import annotations

import re
from typing import Any

from mlx_qlora.dataset.encoding import inner_of
from mlx_qlora.dataset.rows import BadRow
from mlx_qlora.dataset.template_limits import check_template
from mlx_qlora.errors import ConfigError, ModelError

KEY = "data.prompt_template"
EXAMPLE = (
    "mlx-qlora train … "
    r"""--set 'data.prompt_template="### Pergunta:\n{question}\n### Resposta:\n{answer}"'"""
)
_PLACES = ("system", "question", "answer")
_PLACE = re.compile(r"\{([A-Za-z_]\w*)\}")


def is_jinja(template: str) -> bool:
    """Whether a prompt template is a program in Jinja rather than words with places to fill."""
    return "{{" in template or "{%" in template


def chat_template_of(template: str, tokenizer: Any) -> str:
    """The Jinja chat template that ``data.prompt_template`` stands for, with this tokenizer's BOS and EOS.

    In words, ``{question}`` is where a user turn stands and ``{answer}`` the assistant's, or the end;
    ``{system}`` is optional: without it a system prompt and a blank line come first. EOS follows the answer,
    BOS comes first where the tokenizer begins with one, and later turns repeat all but ``{system}``.
    Spaces before ``{answer}`` count to the answer, since tokenizers join them with the word that follows.

    Raises:
        ConfigError: a place is missing, unknown or in the wrong order, or the Jinja is broken or forbidden.
    """
    made = template if is_jinja(template) else _from_words(template, tokenizer)
    try:
        check_template(made)
    except ModelError as error:
        raise ConfigError(error.what, where=KEY) from None
    return made


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer puts BOS before a text."""
    inner = inner_of(tokenizer)
    return inner.bos_token_id is not None and inner("a")["input_ids"][:1] == [inner.bos_token_id]


def check_shows_turns(tokenizer: Any, as_text: Any) -> None:
    """Refuse a template in use that leaves out what is said, which no row would tell so clearly.

    Args:
        as_text: (tokenizer, messages, prompt=…) → the rendered text.

    Raises:
        ConfigError: it leaves out a question or an answer, or refuses the simplest conversation.
    """
    asked = {"role": "user", "content": "MLXQLORA1"}
    answered = {"role": "assistant", "content": "MLXQLORA2"}
    try:
        whole = as_text(tokenizer, [asked, answered], prompt=False)
        prompt = as_text(tokenizer, [asked], prompt=True)
    except (BadRow, ModelError) as problem:
        raise ConfigError(f"The prompt template cannot be used: {problem}", where=KEY) from None
    missing = [
        name for name, mark in (("question", "MLXQLORA1"), ("answer", "MLXQLORA2")) if mark not in whole
    ]
    if not missing and "MLXQLORA1" not in prompt:
        missing = ["question"]
    if missing:
        raise ConfigError(f"The prompt template leaves out the {' and the '.join(missing)}.", where=KEY)


def _from_words(template: str, tokenizer: Any) -> str:
    if "\n" not in template:
        template = template.replace("\\n", "\n")  # as shells and unquoted YAML leave it
    before, after, ask, lead, end = _parts(template)
    inner = inner_of(tokenizer)
    begin = before if before or after else ask
    bos, eos = inner.bos_token or "", inner.eos_token or ""
    writes_bos = begins_with_bos(tokenizer) and not begin.lstrip().startswith(bos)
    closing = end.rstrip()
    separator = end[len(closing) :] or "\n"
    writes_eos = not (eos and closing.endswith(eos))
    prompt = lead.rstrip(" \t")
    return (
        ("{{ bos_token }}" if writes_bos else "")
        + "{% for message in messages %}"
        + "{% if message['role'] == 'system' %}"
        + _shown(before, after if before or after else "\n\n")
        + "{% elif message['role'] == 'assistant' %}"
        + _shown(lead, closing)
        + ("{{ eos_token }}" if writes_eos else "")
        + "{% else %}"
        + "{% if loop.previtem is defined and loop.previtem['role'] == 'assistant' %}"
        + f"{{{{ {separator!r} }}}}"
        + "{% endif %}"
        + _shown(ask, "")
        + "{% endif %}{% endfor %}"
        + f"{{% if add_generation_prompt %}}{{{{ {prompt!r} }}}}{{% endif %}}"
    )


def _shown(before: str, after: str) -> str:
    parts = [repr(before)] * bool(before) + ["message['content']"] + [repr(after)] * bool(after)
    return f"{{{{ {' + '.join(parts)} }}}}"


def _parts(template: str) -> tuple[str, str, str, str, str]:
    """What stands before and after the system prompt, before the question, before and after the answer."""
    names = _PLACE.findall(template)
    unknown = [name for name in names if name not in _PLACES]
    expected = [name for name in _PLACES if name in names]
    problem = None
    if unknown:
        problem = f"{{{unknown[0]}}} is no place; there are {{system}}, {{question}} and {{answer}}"
    elif "question" not in names:
        problem = "it has no {question}"
    elif names != expected:
        problem = "each of {system}, {question} and {answer} may stand there once, in this order"
    if problem is None:
        texts = dict(zip(["", *names], _PLACE.split(template)[::2], strict=True))
        lead, end = texts["question"], texts.get("answer", "")
        if not lead:
            problem = "nothing stands between the question and the answer, so nobody could tell them apart"
    if problem is not None:
        raise ConfigError(f"The prompt template cannot be used: {problem}.", where=KEY, run=EXAMPLE)
    if "system" not in texts:
        return "", "", texts[""], lead, end
    line = re.match(r"[^\n]*\n*", texts["system"])
    after = line.group() if line else ""
    return texts[""], after, texts["system"][len(after) :], lead, end
