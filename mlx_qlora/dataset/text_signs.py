"""Signs that something went wrong with a text on its way: a wrong encoding, markup, control tokens."""

from __future__ import annotations

import re
from collections.abc import Callable

# UTF-8 that was read as Windows-1252 or Latin-1 and written again: ã → Ã£, “ → â€œ, º → Âº.
_MOJIBAKE = re.compile(
    "\u00c3[\u0080-\u00bf\u20ac\u201a\u0192\u201e\u2026\u2020\u2021\u02c6\u2030\u0160\u2039\u0152\u017d"
    "\u2018\u2019\u201c\u201d\u2022\u2013\u2014\u02dc\u2122\u0161\u203a\u0153\u017e\u0178]"
    "|\u00c2[\u00a0-\u00bf]|\u00e2\u20ac.|\u00ef\u00bf\u00bd"
)
_CONTROL_CHARACTER = re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_DECOMPOSED = re.compile("[A-Za-z][\u0300-\u0304\u0306-\u0308\u030a\u030c\u0327\u0328]")
_MARKUP = re.compile(
    r"&(?:nbsp|amp|lt|gt|quot|#\d{2,5});|</?(?:p|br|div|span|td|tr|li)\b[^<>]*>", re.IGNORECASE
)

SIGNS: dict[str, tuple[str, Callable[[str], object]]] = {
    "mojibake": (
        "rows with letters such as Ã£ for ã: UTF-8 that was once read as Windows-1252",
        _MOJIBAKE.search,
    ),
    "replacement_character": (
        "rows with U+FFFD (\ufffd), which stands where a letter was lost",
        lambda text: "\ufffd" in text,
    ),
    "control_characters": (
        "rows with control characters, which no keyboard types",
        _CONTROL_CHARACTER.search,
    ),
    "decomposed_accents": (
        "rows whose accents are characters of their own (NFD), which become other tokens than usual",
        _DECOMPOSED.search,
    ),
    "markup": ("rows with HTML such as &nbsp; or <br>, which the model will write too", _MARKUP.search),
}
"""Name → what it says of rows, and whether a text has it."""

KNOWN_CONTROL = re.compile(
    r"<\|[a-zA-Z_]{2,40}\|>|</?s>|<(?:bos|eos|pad|unk)>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
)
"""Control tokens of the families people use; for where no tokenizer is there to ask."""
