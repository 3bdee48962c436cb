"""Whether the data, the system prompt and the template speak one language."""

from __future__ import annotations

import re
from collections.abc import Iterator

from mlx_qlora.dataset.check import CheckedData
from mlx_qlora.dataset.encoding import encoder_of
from mlx_qlora.dataset.finding import Finding
from mlx_qlora.dataset.language import Guess, guess_language
from mlx_qlora.dataset.prompt_template import is_jinja
from mlx_qlora.dataset.render import as_text
from mlx_qlora.dataset.rows import BadRow

_SURE = 0.6


def language_findings(checked: CheckedData, language: Guess | None, command: str) -> Iterator[Finding]:
    """A warning for each part that speaks another language than the rows do.

    Args:
        language: Of the training rows.
        command: The training command that settings are added to.
    """
    if language is None or language.certainty < _SURE:
        return
    config = checked.config
    prompt = guess_language(config.system_prompt) if config.system_prompt else None
    if prompt is not None and prompt.words > 1 and prompt.certainty >= _SURE and prompt.code != language.code:
        yield Finding(
            "warning",
            "language_of_system_prompt",
            f"the rows are in {language}, and data.system_prompt is in {prompt}",
            run=f"{command} --set 'data.system_prompt=…'",
        )
    frame = guess_language(_frame(checked), is_frame=True)
    if frame is not None and frame.certainty >= _SURE and frame.code != language.code:
        yield Finding(
            "note" if config.prompt_template is None else "warning",
            "language_of_template",
            f"the rows are in {language}, and what the template writes around them is in {frame}",
            run=f"{command} --set 'data.prompt_template=…'   # or data.system_prompt, in the rows' language",
        )


def _frame(checked: CheckedData) -> str:
    """The words that a template adds to a conversation, a system prompt of its own among them."""
    template = checked.config.prompt_template
    if checked.tokenizer is None:
        plain = template is not None and not is_jinja(template)
        return re.sub(r"\{\w+\}", " ", template or "") if plain else ""
    try:
        shown = as_text(checked.tokenizer, [{"role": "user", "content": "0"}], prompt=True)
    except BadRow:
        return ""
    for name in encoder_of(checked.tokenizer).control:
        shown = shown.replace(name, " ")
    return shown
