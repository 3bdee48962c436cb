"""training/report_html.py and report_blocks.py: one page that needs nothing and lets nothing through."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_qlora.config import LoraConfig, build_config
from mlx_qlora.training.report import variant_name
from mlx_qlora.training.report_blocks import (
    Bars,
    Code,
    Exchange,
    Heading,
    Listing,
    Paragraph,
    Picture,
    Table,
    to_markdown,
)
from mlx_qlora.training.report_html import to_html

HOSTILE = (
    "</pre><script>alert(1)</script>&<img src=x onerror=y> \"'` ]]> <!-- \x00\x1b[31m \x85 ``` **x** é 🐍"
)


def every_block(text: str) -> list:
    return [
        Heading(text), Paragraph(text), Table((text, "b"), [(text, text)]), Listing([text]),
        Code(text, "yaml"),
        Picture("loss.png", text, '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"></svg>'),
        Bars(text, [(text, 3), ("b", 0)], text), Exchange(text, [("prompt", text), (text, text)]),
    ]  # fmt: skip


class Seen(HTMLParser):
    """Tags, attributes and text, as a browser's tokenizer has them."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attr) for attr in attrs]

    def handle_data(self, data):
        self.texts.append(data)


def check_page(page: str) -> Seen:
    """Well-formed, without a script, and without anything to fetch."""
    assert page.startswith("<!DOCTYPE html>\n")
    ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    seen = Seen(page)
    assert not {"script", "iframe", "object", "embed", "link", "img", "base", "form"} & set(seen.tags)
    assert not [a for a in seen.attributes if a[1].startswith("on") or a[1] in ("src", "srcset", "action")]
    references = [value for _, name, value in seen.attributes if name.endswith("href")]
    assert all(value.startswith("#") for value in references)
    style = "".join(re.findall(r"<style[^>]*>(.*?)</style>", page, re.DOTALL))
    assert "@import" not in style
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    return seen


def test_text_of_a_model_stays_text_wherever_it_stands():
    seen = check_page(to_html(every_block(HOSTILE), HOSTILE))
    assert "".join(seen.texts).count("<script>alert(1)</script>") >= 8


@settings(max_examples=150, deadline=None)
@given(text=st.text())
def test_any_text_makes_a_page_that_is_well_formed(text):
    check_page(to_html(every_block(text), text))


def test_lone_surrogates_are_written_too():
    to_html(every_block("\ud800 ok"), "t").encode()


def test_marks_of_our_own_text_are_code_and_strong_and_nothing_is_marked_in_code():
    page = to_html([Paragraph("a **b** `c **d**`"), Exchange("t", [("base", "**e** `f`")])], "t")
    assert "<p>a <strong>b</strong> <code>c **d**</code></p>" in page
    assert "<pre>**e** `f`</pre>" in page


def test_a_page_has_headings_language_title_and_scopes_for_readers_who_listen():
    page = to_html([Heading("The run", 1), Table(("step", "loss"), [("1", "0.5")])], "the club")
    assert '<html lang="en">' in page
    assert "<title>the club</title>" in page
    assert '<th scope="col">step</th>' in page
    assert '<th scope="row">1</th><td class="number">0.5</td>' in page


def test_a_table_without_a_head_has_none():
    assert "<thead>" not in to_html([Table(("", ""), [("a", "b")])], "t")


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="`~ab\n<#|", max_size=30))
def test_markdown_keeps_any_text_inside_its_fence(text):
    written = to_markdown([Exchange("t", [("base", text)])])
    fences = [line for line in written.splitlines() if re.fullmatch(r"`{3,}(text)?", line)]
    opening = next(line for line in written.splitlines() if line.endswith("`text"))
    closing = opening.removesuffix("text")
    inner = written.split(opening + "\n", 1)[1]
    assert inner.rindex(f"\n{closing}") == inner.index(f"\n{closing}")
    assert fences


def test_bars_are_as_long_as_their_counts():
    written = to_markdown([Bars("tokens", [("1–32", 10), ("33–64", 5), ("65–96", 1), ("97–128", 0)])])
    assert [line.count("█") for line in written.splitlines()[2:6]] == [32, 16, 3, 0]
    page = to_html([Bars("tokens", [("a", 10), ("b", 5)])], "t")
    assert re.findall(r"width:([\d.]+)%", page) == ["100.0", "50.0"]


@pytest.mark.parametrize(
    ("lora", "name"),
    [
        ({}, "LoRA"),
        ({"variant": "rslora"}, "rsLoRA"),
        ({"variant": "dora"}, "DoRA"),
        ({"init": "pissa"}, "LoRA, begun with PiSSA"),
        ({"variant": "rslora", "init": "loftq"}, "rsLoRA, begun with LoftQ"),
    ],
)
def test_the_variant_is_named(lora, name):
    assert variant_name(LoraConfig(**lora)) == name
    assert build_config({"lora": lora}).lora == LoraConfig(**lora)


@pytest.mark.slow
def test_a_browser_reads_the_page_as_it_was_meant(tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    path = tmp_path / "report.html"
    path.write_text(to_html(every_block(HOSTILE), HOSTILE), encoding="utf-8")
    dumped = subprocess.run(
        [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{path}"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    seen = Seen(dumped.stdout)
    assert "script" not in seen.tags
    assert "img" not in seen.tags
    assert seen.tags.count("section") == 1
