"""Rows in the forms that data comes in, as chat rows: SQuAD, Alpaca, ShareGPT, OpenAI chats, tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_qlora.dataset.records import SCHEMAS
from mlx_qlora.dataset.row_table import normalised
from mlx_qlora.dataset.rows import BadRow

Row = Mapping[str, Any]
_CHAT = next(schema for schema in SCHEMAS if schema.name == "chat")
_ALIASES = {
    "question": (
        "question",
        "pergunta",
        "pregunta",
        "questao",
        "prompt",
        "instruction",
        "instrucao",
        "q",
        "p",
    ),
    "answer": ("answer", "resposta", "respuesta", "completion", "response", "output", "saida", "a", "r"),
    "context": ("context", "contexto", "passage"),
    "system": ("system", "system prompt", "sistema"),
    "input": ("input", "entrada"),
    "instruction": ("instruction", "instrucao", "instruccion"),
    "output": ("output", "saida", "response", "resposta"),
    "messages": ("messages",),
    "conversations": ("conversations", "conversation"),
    "answers": ("answers",),
    "text": ("text", "texto"),
}
COLUMN_NAMES = tuple(_ALIASES)
_SPEAKERS = {
    "human": "user", "user": "user", "prompter": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant", "bot": "assistant",
    "system": "system", "developer": "system",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip


@dataclass
class Columns:
    """Finds a row's columns: by the names that were given, or by those people use."""

    given: Mapping[str, str]
    used: dict[str, str] = field(default_factory=dict)
    """Our name → the row's own, of every column that was found."""
    _known: dict[tuple[str, ...], dict[str, str]] = field(default_factory=dict)

    def name_in(self, row: Row, name: str) -> str | None:
        """The row's own name of a column; None when it has none."""
        own = self.given.get(name)
        if own is None:
            plain = self._plain_names(tuple(row))
            own = next((plain[alias] for alias in _ALIASES[name] if alias in plain), None)
        elif own not in row:
            own = None
        if own is not None:
            self.used[name] = own
        return own

    def _plain_names(self, names: tuple[str, ...]) -> dict[str, str]:
        """Names without case, accents and underscores → as they are; of two, the first."""
        if names not in self._known:
            if len(self._known) > 100:  # rows that all differ
                self._known.clear()
            self._known[names] = {normalised(name.replace("_", " ")): name for name in reversed(names)}
        return self._known[names]

    def value(self, row: Row, name: str) -> Any:
        """What stands in a column.

        Raises:
            BadRow: there is no such column.
        """
        own = self.name_in(row, name)
        if own is None:
            raise BadRow(f"it has no {self.given.get(name, name)!r}")
        return row[own]

    def optional(self, row: Row, name: str) -> str | None:
        """The text of a column; None when there is none or it is empty."""
        own = self.name_in(row, name)
        value = row[own] if own is not None else None
        return _text(value, own or name) if value is not None and str(value).strip() else None


@dataclass
class Converter:
    """Builds chat rows, and counts what is worth telling."""

    columns: Columns
    with_context: bool = False
    left_off: int = 0
    """Conversations whose end, after the last answer, was left off."""
    contexts_left_out: int = 0

    def checked(self, turns: list[dict[str, str]]) -> dict[str, Any]:
        """The row, if training would take it; turns after the last answer are left off.

        Raises:
            BadRow: it would not.
        """
        last = max((at for at, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
        if last < 0:
            raise BadRow("it has no answer to learn from")
        row = {"messages": turns[: last + 1]}
        _CHAT.build(row, "")
        self.left_off += last + 1 < len(turns)
        return row

    def pair(
        self, row: Row, question: str, answer: str, context: str | None = None, system: str | None = None
    ) -> dict[str, Any]:
        """One question and its answer."""
        context = context if context is not None else self.columns.optional(row, "context")
        if context and self.with_context:
            question = f"{context.strip()}\n\n{question}"
        elif context:
            self.contexts_left_out += 1
        system = system if system is not None else self.columns.optional(row, "system")
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return self.checked([{"role": "system", "content": system}, *turns] if system else turns)

    def table(self, row: Row) -> Iterator[dict[str, Any]]:
        """question and answer, by whatever name."""
        names = [self.columns.name_in(row, name) for name in ("question", "answer")]
        if names[0] == names[1]:
            raise BadRow(f"it has no question and answer, but {', '.join(map(repr, list(row)[:8]))}")
        question, answer = (self.columns.value(row, name) for name in ("question", "answer"))
        yield self.pair(row, _text(question, names[0] or ""), _text(answer, names[1] or ""))

    def alpaca(self, row: Row) -> Iterator[dict[str, Any]]:
        """instruction, input and output; the input comes after the instruction and a blank line."""
        asked = _text(self.columns.value(row, "instruction"), "instruction")
        given = self.columns.optional(row, "input")
        asked = f"{asked}\n\n{given}" if given else asked
        yield self.pair(row, asked, _text(self.columns.value(row, "output"), "output"))

    def squad(self, row: Row) -> Iterator[dict[str, Any]]:
        """question, context and answers; the first answer counts."""
        answers = self.columns.value(row, "answers")
        answer = _first_answer(answers)
        if row.get("is_impossible") or answer is None:
            raise BadRow("it has no answer (is_impossible)")
        yield self.pair(row, _text(self.columns.value(row, "question"), "question"), answer)

    def sharegpt(self, row: Row) -> Iterator[dict[str, Any]]:
        """conversations of from and value."""
        turns = _turns(self.columns.value(row, "conversations"), "from", "value")
        yield self.checked(self._with_system(row, turns))

    def openai(self, row: Row) -> Iterator[dict[str, Any]]:
        """messages of role and content, which may be a list of texts."""
        turns = _turns(self.columns.value(row, "messages"), "role", "content")
        yield self.checked(self._with_system(row, turns))

    def text(self, row: Row) -> Iterator[dict[str, Any]]:
        """text as it is."""
        content = _text(self.columns.value(row, "text"), "text")
        yield {"text": content}

    def _with_system(self, row: Row, turns: list[dict[str, str]]) -> list[dict[str, str]]:
        system = self.columns.optional(row, "system")
        has_own = any(turn["role"] == "system" for turn in turns)
        return [{"role": "system", "content": system}, *turns] if system and not has_own else turns


FORMS: dict[str, tuple[str, Callable[[Converter, Row], Iterator[dict[str, Any]]]]] = {
    "openai": ("OpenAI chats (messages: role, content)", Converter.openai),
    "sharegpt": ("ShareGPT (conversations: from, value)", Converter.sharegpt),
    "squad": ("SQuAD (context, question, answers)", Converter.squad),
    "alpaca": ("Alpaca (instruction, input, output)", Converter.alpaca),
    "table": ("a table of questions and answers", Converter.table),
    "text": ("plain text", Converter.text),
}
"""Name → what it is called, and how a row of it is converted."""


def form_of(row: Row, columns: Columns) -> str | None:
    """The form that a row shows, told by its columns; None when it shows none."""
    wanted = {
        "openai": ("messages",),
        "sharegpt": ("conversations",),
        "squad": ("question", "answers"),
        "alpaca": ("instruction", "output"),
        "table": ("question", "answer"),
        "text": ("text",),
    }
    fresh = Columns(columns.given)
    for form, names in wanted.items():
        found = [fresh.name_in(row, name) for name in names]
        if None not in found and len(set(found)) == len(found):
            return form
    return None


def rows_of_squad(tree: Any) -> Iterator[Row | BadRow]:
    """The rows of a nested SQuAD file: data, paragraphs, qas."""
    for article in _listed(tree, "data"):
        for paragraph in _listed(article, "paragraphs"):
            for asked in _listed(paragraph, "qas"):
                if isinstance(asked, dict) and isinstance(paragraph, dict):
                    yield {**asked, "context": paragraph.get("context")}
                else:
                    yield BadRow("it is no question with answers")


def _listed(tree: Any, key: str) -> list[Any]:
    found = tree.get(key) if isinstance(tree, dict) else None
    return found if isinstance(found, list) else [None]


def _turns(value: Any, role_key: str, content_key: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise BadRow("it is no list of turns")
    turns = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict):
            raise BadRow(f"turn {number} is no object")
        said = turn.get(role_key, turn.get("role"))
        role = _SPEAKERS.get(said.lower()) if isinstance(said, str) else None
        if role is None:
            raise BadRow(f"turn {number} is of {str(said)[:40]!r}, who is unknown")
        content = turn.get(content_key, turn.get("content"))
        if turn.get("tool_calls") and not content:
            raise BadRow(f"turn {number} calls a tool, which no template here shows")
        turns.append({"role": role, "content": _joined(content, number)})
    return turns


def _joined(content: Any, number: int) -> str:
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise BadRow(f"turn {number} holds something that is not text")
        return "\n".join(texts)
    return _text(content, f"content of turn {number}")


def _first_answer(answers: Any) -> str | None:
    texts = answers.get("text") if isinstance(answers, dict) else answers
    if isinstance(texts, str):
        return texts
    if not isinstance(texts, list) or not texts:
        return None
    first = texts[0].get("text") if isinstance(texts[0], dict) else texts[0]
    return first if isinstance(first, str) and first.strip() else None


def _text(value: Any, name: str) -> str:
    """Text; a number as it is written."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise BadRow(f"{name!r} is a {type(value).__name__}, not text")
    if not value.strip():
        raise BadRow(f"{name!r} is empty")
    return value
