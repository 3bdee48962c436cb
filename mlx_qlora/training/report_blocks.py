"""The pieces a report is made of, and how Markdown writes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Row = Sequence[str]


@dataclass(frozen=True)
class Heading:
    """The title of a section; level 1 is the report's own."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Text of our own, in which ``…`` is code and **…** is strong; never text of a model's."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells; cells are text of our own."""

    head: Row
    rows: Sequence[Row]
    numbers_from: int = 1
    """Columns from this one on are aligned to the right in HTML."""


@dataclass(frozen=True)
class Listing:
    """Points, one below the other."""

    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    """Any text, as it is."""

    text: str
    language: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture beside the report, which HTML holds inside."""

    name: str
    alt: str
    svg: str
    """Its own drawing for HTML, in the colours of the page."""


@dataclass(frozen=True)
class Bars:
    """A histogram: label, count, and whether the bin is marked."""

    unit: str
    bins: Sequence[tuple[str, int]]
    note: str = ""


@dataclass(frozen=True)
class Exchange:
    """What was asked and answered: (who, any text)."""

    title: str
    parts: Sequence[tuple[str, str]]


Block = Heading | Paragraph | Table | Listing | Code | Picture | Bars | Exchange

_BAR = 32


def to_markdown(blocks: Sequence[Block]) -> str:
    """The blocks as GitHub's Markdown."""
    return "\n\n".join(_WRITERS[type(block)](block) for block in blocks) + "\n"


def _heading(block: Heading) -> str:
    return f"{'#' * block.level} {block.text}"


def _paragraph(block: Paragraph) -> str:
    return block.text


def _table(block: Table) -> str:
    lines = [block.head, ["---"] * len(block.head), *block.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _listing(block: Listing) -> str:
    return "\n".join(f"- {item}" for item in block.items)


def _code(block: Code) -> str:
    longest = max((len(ticks) for ticks in re.findall(r"`+", block.text)), default=0)
    fence = "`" * max(3, longest + 1)
    end = "" if block.text.endswith("\n") else "\n"
    return f"{fence}{block.language}\n{block.text}{end}{fence}"


def _picture(block: Picture) -> str:
    return f"![{block.alt}]({block.name})"


def _bars(block: Bars) -> str:
    most = max((count for _, count in block.bins), default=0) or 1
    labels = max((len(label) for label, _ in block.bins), default=0)
    lines = [
        f"{label:>{labels}}  {'█' * max(int(count > 0), round(_BAR * count / most)):<{_BAR}}  {count}"
        for label, count in block.bins
    ]
    note = f"\n\n{block.note}" if block.note else ""
    return _code(Code("\n".join([f"{block.unit}", *lines]), "text")) + note


def _exchange(block: Exchange) -> str:
    parts = [f"**{who}**\n\n{_code(Code(text or ' ', 'text'))}" for who, text in block.parts]
    return "\n\n".join([f"### {block.title}", *parts])


_WRITERS: dict[type, Callable[..., str]] = {
    Heading: _heading,
    Paragraph: _paragraph,
    Table: _table,
    Listing: _listing,
    Code: _code,
    Picture: _picture,
    Bars: _bars,
    Exchange: _exchange,
}
