"""Blocks of a report as one HTML file that needs no other: for light and dark, phone and paper.

It is well-formed XML too, and has no script; all text is escaped, a model's above all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html import escape

from mlx_qlora.training.report_blocks import (
    Bars,
    Block,
    Code,
    Exchange,
    Heading,
    Listing,
    Paragraph,
    Picture,
    Table,
)

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Should anything slip through, a browser still fetches and runs nothing."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6470; --line: #d9dee4; --paper: #ffffff;
  --tint: #f4f6f8; --blue: #0072b2; --sky: #56b4e9; --vermilion: #d55e00; --green: #009e73;
  --purple: #aa4499; }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #a3adb8; --line: #3a424c;
  --paper: #14181d; --tint: #1e242b; --blue: #7cc6f2; --sky: #2f7fae; --vermilion: #ff8c42;
  --green: #3fcf9f; --purple: #e39ac6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 50rem; overflow-wrap: anywhere;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.75rem; padding-bottom: 0.25rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 0.5rem; }
p, ul { margin: 0.75rem 0; }
ul { padding-left: 1.25rem; }
li { margin: 0.35rem 0; }
code, pre { font: 0.875rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
code { background: var(--tint); padding: 0.1em 0.3em; border-radius: 4px; }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: 6px; padding: 0.75rem;
  margin: 0.5rem 0; white-space: pre-wrap; }
pre code { background: none; padding: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { text-align: left; padding: 0.35rem 0 0.35rem 0.75rem; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th:first-child, td:first-child { padding-left: 0; }
thead th { color: var(--soft); font-weight: 600; font-size: 0.875rem; }
tbody th { font-weight: 400; }
.number { text-align: right; }
@media (max-width: 30rem) { table { font-size: 0.875rem; } th, td { padding-left: 0.4rem; } }
figure { margin: 1rem 0; }
figure svg { display: block; width: 100%; max-width: 40rem; height: auto; margin: auto; color: var(--ink); }
.bars { display: grid; grid-template-columns: auto 1fr auto; gap: 0.2rem 0.75rem; align-items: center;
  font-variant-numeric: tabular-nums; font-size: 0.9rem; }
.bars .label { text-align: right; color: var(--soft); }
.bars .bar { display: block; height: 0.9rem; background: var(--blue); border-radius: 2px; }
.soft { color: var(--soft); font-size: 0.9rem; }
.exchange { border: 1px solid var(--line); border-radius: 8px; padding: 0.25rem 1rem 0.75rem;
  margin: 1rem 0; }
.exchange h4 { margin: 0.75rem 0 0.25rem; font-size: 0.875rem; font-weight: 600; color: var(--soft); }
@media print { body { max-width: none; padding: 0; font-size: 10pt; }
  h2, h3, h4 { break-after: avoid; } figure, table, .bars, .exchange { break-inside: avoid; }
  .bars .bar { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def to_html(blocks: Sequence[Block], title: str) -> str:
    """The blocks as one file."""
    body = "\n".join(_WRITERS[type(block)](block) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"/>\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def _text(text: str) -> str:
    """Escaped; control characters, which neither HTML nor XML can hold, as their pictures."""
    shown = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", lambda match: chr(0x2400 + ord(match.group())), text)
    return escape(re.sub(r"[\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff]", "\ufffd", shown))


def _inline(text: str) -> str:
    """Our own text: ``…`` is code, **…** is strong; within code nothing is."""
    pieces = re.split(r"`([^`]+)`", text)
    return "".join(
        f"<code>{_text(piece)}</code>"
        if at % 2
        else re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", _text(piece))
        for at, piece in enumerate(pieces)
    )


def _heading(block: Heading) -> str:
    return f"<h{block.level}>{_text(block.text)}</h{block.level}>"


def _paragraph(block: Paragraph) -> str:
    return f"<p>{_inline(block.text)}</p>"


def _table(block: Table) -> str:
    def cells(row: Sequence[str], *, is_head: bool = False) -> str:
        made = []
        for at, cell in enumerate(row):
            tag = "th" if is_head or at == 0 else "td"
            scope = f' scope="{"col" if is_head else "row"}"' if tag == "th" else ""
            kind = ' class="number"' if at >= block.numbers_from else ""
            made.append(f"<{tag}{scope}{kind}>{_inline(cell)}</{tag}>")
        return f"<tr>{''.join(made)}</tr>"

    head = f"<thead>{cells(block.head, is_head=True)}</thead>" if any(block.head) else ""
    body = "\n".join(cells(row) for row in block.rows)
    return f'<div class="wide"><table>{head}<tbody>\n{body}\n</tbody></table></div>'


def _listing(block: Listing) -> str:
    return "<ul>\n" + "\n".join(f"<li>{_inline(item)}</li>" for item in block.items) + "\n</ul>"


def _code(block: Code) -> str:
    return f"<pre><code>{_text(block.text)}</code></pre>"


def _picture(block: Picture) -> str:
    return f'<figure role="img" aria-label="{_text(block.alt)}">{block.svg}</figure>'


def _bars(block: Bars) -> str:
    most = max((count for _, count in block.bins), default=0) or 1
    rows = [
        f'<span class="label">{_text(label)}</span>'
        f'<span><span class="bar" style="width:{100 * count / most:.1f}%"></span></span>'
        f"<span>{count}</span>"
        for label, count in block.bins
    ]
    note = f'<p class="soft">{_inline(block.note)}</p>' if block.note else ""
    return (
        f'<p class="soft">{_inline(block.unit)}</p>\n<div class="bars">\n'
        + "\n".join(rows)
        + f"\n</div>{note}"
    )


def _exchange(block: Exchange) -> str:
    parts = [f"<h4>{_text(who)}</h4>\n<pre>{_text(text)}</pre>" for who, text in block.parts]
    return f'<section class="exchange">\n<h3>{_text(block.title)}</h3>\n' + "\n".join(parts) + "\n</section>"


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
