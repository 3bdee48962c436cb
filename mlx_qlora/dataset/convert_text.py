"""Text that people write by hand: questions and answers with P: and R:, and long text in pieces."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mlx_qlora.dataset.rows import BadRow

_MARK = re.compile(
    r"^\s*(?:[#>]+\s*|[-*]\s+|\d+[.)]\s*)*(?P<bold>\*{1,3}|_{1,3})?"
    r"(?:(?P<question>[PQ]|(?i:pergunta|pregunta|questão|question))"
    r"|(?P<answer>[RA]|(?i:resposta|respuesta|answer)))"
    r"\s*\d*\s*(?(bold)(?P=bold)?)\s*:\s*(?(bold)(?P=bold)?)[ \t]*(?P<rest>.*)$"
)
_HEADING = re.compile(r"^#{1,6}\s")
_FENCE = re.compile(r"^\s*(```|~~~)")
_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|\n")


def is_questions_and_answers(text: str) -> bool:
    """Whether a text has lines that begin with a question's mark and others with an answer's."""
    marks = [found for line in text.splitlines()[:400] if (found := _MARK.match(line))]
    return len({found["question"] is None for found in marks}) == 2


def questions_and_answers(text: str) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """(line, row) for each question; lines without a mark go on with what stands above them.

    What stands before the first question is left out: `text_before_questions` gives it.
    """
    begin, problem = 0, ""
    question: list[str] = []
    answer: list[str] = []
    part: list[str] | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        mark = _MARK.match(line)
        if mark is None:
            if part is not None:
                part.append(line)
        elif mark["question"] is not None:
            if begin:
                yield begin, _pair(question, answer, problem)
            begin, question, answer, problem = number, [mark["rest"]], [], ""
            part = question
        else:
            if answer:
                problem = f"it has a second answer in line {number}"
            elif not begin:
                begin, problem = number, "it is an answer without a question"
            answer.append(mark["rest"])
            part = answer
    if begin:
        yield begin, _pair(question, answer, problem)


def text_before_questions(text: str) -> int:
    """How many lines with words stand before the first question or answer."""
    count = 0
    for line in text.splitlines():
        if _MARK.match(line):
            break
        count += bool(line.strip())
    return count


def _pair(question: list[str], answer: list[str], problem: str) -> dict[str, Any] | BadRow:
    asked, answered = "\n".join(question).strip(), "\n".join(answer).strip()
    if not problem:
        problem = "its question is empty" if not asked else "it has no answer" if not answered else ""
    return BadRow(problem) if problem else {"question": asked, "answer": answered}


def chunks(text: str, num_characters: int) -> Iterator[tuple[int, str]]:
    """(line, piece): paragraphs together up to so many characters, none of them lost or in another order.

    A heading goes with what follows it, code between fences stays whole where it fits, and a paragraph
    that is too long is cut between sentences, then words.
    """
    held: list[tuple[int, str]] = []
    for line, block in _blocks(text):
        pieces = _pieces(block, num_characters)
        for piece in pieces:
            if _size(held, piece) > num_characters:
                headings = _trailing_headings(held) if len(pieces) == 1 else []
                if _size(headings, piece) > num_characters:
                    headings = []
                if whole := held[: len(held) - len(headings)]:
                    yield _joined(whole)
                held = headings
            held.append((line, piece))
    if held:
        yield _joined(held)


def _size(held: list[tuple[int, str]], piece: str) -> int:
    return sum(len(each) + 2 for _, each in held) + len(piece)


def _joined(held: list[tuple[int, str]]) -> tuple[int, str]:
    return held[0][0], "\n\n".join(each for _, each in held)


def _blocks(text: str) -> Iterator[tuple[int, str]]:
    """(line, paragraph): what stands between blank lines, code between fences in one."""
    lines: list[str] = []
    begin, fence = 1, None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() and fence is None:
            if lines:
                yield begin, "\n".join(lines)
            lines = []
            continue
        begin = begin if lines else number
        lines.append(line.rstrip())
        if (found := _FENCE.match(line)) is not None:
            fence = None if fence == found[1] else fence or found[1]
    if lines:
        yield begin, "\n".join(lines)


def _trailing_headings(held: list[tuple[int, str]]) -> list[tuple[int, str]]:
    count = 0
    while count < len(held) and _is_heading(held[-1 - count][1]):
        count += 1
    return held[len(held) - count :]


def _is_heading(block: str) -> bool:
    return _HEADING.match(block) is not None and "\n" not in block


def _pieces(block: str, num_characters: int) -> list[str]:
    if len(block) <= num_characters:
        return [block]
    pieces, rest = [], block
    while len(rest) > num_characters:
        ends = [found.start() for found in _SENTENCE_END.finditer(rest, 0, num_characters + 1)]
        at = max((end for end in ends if 0 < end <= num_characters), default=0)
        at = at or rest.rfind(" ", 1, num_characters + 1)
        at = at if at > 0 else num_characters
        if rest[:at].strip():
            pieces.append(rest[:at].rstrip())
        rest = rest[at:].lstrip()
    return [*pieces, rest] if rest.strip() else pieces
