"""A conversation at a terminal or in a pipe: lines that come in, answers that are written as they come."""

from __future__ import annotations

import os
import re
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from mlx_qlora.commands.output import say
from mlx_qlora.errors import ConfigError, Interrupted

_JOINER = "\u200d"  # between the parts of one emoji


class AnswerWriter:
    """Writes an answer as it comes; on a terminal no word is broken and nothing but text is let through.

    Args:
        out: A terminal, or a file that gets the pieces as they are.
        is_silent: Write nothing at all.
    """

    def __init__(self, out: TextIO, *, is_silent: bool) -> None:
        self.out, self.is_silent = out, is_silent
        self.width = _width(out)
        self.column, self.gap, self.word = 0, 0, ""
        self.has_begun = False

    def write(self, piece: str) -> None:
        """Take a piece of the answer; what stands before its first word is left out."""
        piece = piece if self.has_begun else piece.lstrip()
        if self.is_silent or not piece:
            return
        self.has_begun = True
        if not self.width:
            self.out.write(piece)
        for part in re.split(r"(\s)", piece) if self.width else ():
            self._on_terminal(part)
        self.out.flush()

    def end(self) -> None:
        """The answer is whole: what is held back, and the end of the line."""
        if self.has_begun:
            self._put_word()
            self.out.write("\n")
            self.out.flush()

    def _on_terminal(self, part: str) -> None:
        if not part.isspace():
            # A model may write an escape sequence; a terminal must not carry it out.
            self.word += "".join(
                c for c in part if unicodedata.category(c) not in ("Cc", "Cf") or c == _JOINER
            )
            return
        self._put_word()
        if part == "\n":
            self._break()
        else:
            self.gap += 1

    def _put_word(self) -> None:
        if not self.word:
            return
        length = sum(_columns(character) for character in self.word)
        if self.column and self.column + self.gap + length > self.width:
            self._break()
        self.out.write(" " * self.gap + self.word)
        self.column += self.gap + length
        self.word, self.gap = "", 0

    def _break(self) -> None:
        self.out.write("\n")
        self.column, self.gap = 0, 0


def _width(out: TextIO) -> int:
    """Columns of a terminal, now: a window changes its size, and COLUMNS may be another's. 0 for a file."""
    if not out.isatty():
        return 0
    with suppress(OSError):
        return os.get_terminal_size(out.fileno()).columns or 80
    return 80


def _columns(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Mn"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def typed_lines() -> Iterator[str]:
    """What a person types, with line editing and this session's history; two Ctrl-C in a row end it."""
    with suppress(ImportError):
        import readline  # noqa: F401  # input() edits lines from now on
    can_prompt = sys.stdout.isatty()
    lines, was_interrupted = list[str](), False
    while True:
        try:
            line = input(("… " if lines else "> ") if can_prompt else "")
        except EOFError:
            say()
            return
        except KeyboardInterrupt:
            if was_interrupted:
                say()
                return
            say("\n(Ctrl-C again, or Ctrl-D, ends)")
            lines, was_interrupted = [], True
            continue
        except UnicodeDecodeError:
            say("(this is no UTF-8 text)")
            continue
        was_interrupted = False
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            yield "\n".join(lines)
            lines = []


def piped_lines(file: TextIO) -> Iterator[str]:
    """The lines of a file or pipe, those that end in a backslash joined with the next.

    Raises:
        ConfigError: they are no UTF-8 text.
        Interrupted: Ctrl-C meanwhile.
    """
    lines = list[str]()
    try:
        for line in file:
            text = line.rstrip("\r\n").removeprefix("\ufeff")
            lines.append(text.removesuffix("\\"))
            if not text.endswith("\\"):
                yield "\n".join(lines)
                lines = []
    except UnicodeDecodeError as error:
        raise ConfigError(f"The questions are no UTF-8 text: {error.reason}.") from None
    except KeyboardInterrupt:
        raise Interrupted("stopped", signal_number=signal.SIGINT) from None
    if lines:
        yield "\n".join(lines)


@contextmanager
def stop_on_ctrl_c() -> Iterator[Callable[[], bool]]:
    """While this is open Ctrl-C only asks; what is given back tells whether it did. A second interrupts."""
    asked = list[int]()

    def ask(number: int, frame: Any) -> None:
        if asked:
            signal.default_int_handler(number, frame)
        asked.append(number)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)
