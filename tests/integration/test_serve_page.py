"""The page at `/` in a headless Chromium: it chats, stops, asks for the key, fits a telephone, and speaks two
languages."""

import base64
import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.served import serving

PAGE = Path(__file__).parents[2] / "mlx_qlora" / "serving" / "page"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEY = "a-key-of-more-than-16"

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


class Browser:
    """One tab, driven over a pipe by Chromium's DevTools protocol."""

    def __init__(self, profile: Path, language: str) -> None:
        to_browser, self._to = os.pipe()
        self._from, from_browser = os.pipe()
        self._ids, self._waiting, self.errors = itertools.count(1), b"", []
        # the protocol's pipe is file descriptors 3 and 4
        command = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu",
             "--remote-debugging-pipe", f"--user-data-dir={profile}", f"--accept-lang={language}",
             "--no-first-run", "--disable-background-networking"],
            pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            env={**os.environ, "LANGUAGE": language, "HOME": str(profile)},
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        target = self.send("Target.createTarget", {"url": "about:blank"}, session=False)["targetId"]
        attached = self.send("Target.attachToTarget", {"targetId": target, "flatten": True}, session=False)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method, parameters=None, *, session=True):
        """Call the protocol and wait for the answer; complaints of the page are kept on the way."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters or {}}
        if session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            got = self._receive()
            if got.get("id") == number:
                assert "error" not in got, got
                return got["result"]
            if got.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.errors.append(json.dumps(got["params"]))

    def _receive(self):
        while b"\0" not in self._waiting:
            part = os.read(self._from, 1 << 20)
            assert part, "the browser has ended"
            self._waiting += part
        message, _, self._waiting = self._waiting.partition(b"\0")
        return json.loads(message)

    def run(self, script):
        """The value of a JavaScript expression in the page."""
        options = {"expression": script, "returnByValue": True, "awaitPromise": True}
        result = self.send("Runtime.evaluate", options)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, script, seconds=30):
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"{script} did not come; {self.errors}"
            time.sleep(0.03)
        return value

    def open(self, url, *, width=1000, scheme="light"):
        """Load a page in a window of that width."""
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", {"features": features})
        self.send("Page.navigate", {"url": url})
        self.until("document.readyState === 'complete'")

    def screenshot(self, path):
        """What is seen, as PNG."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))

    def close(self):
        """End the browser."""
        with contextlib.suppress(OSError, AssertionError):
            self.send("Browser.close", session=False)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._process.kill()
        self._process.wait(10)
        os.close(self._to)
        os.close(self._from)


@pytest.fixture
def browser(tmp_path):
    made = Browser(tmp_path / "profile", "en-GB")
    yield made
    made.close()


def ask(browser, question):
    """Type a question and press Enter, as a person does."""
    browser.run("document.getElementById('question').focus()")
    browser.send("Input.insertText", {"text": question})
    for kind in ("rawKeyDown", "keyUp"):
        browser.send("Input.dispatchKeyEvent", {"type": kind, "key": "Enter", "code": "Enter",
                                                "windowsVirtualKeyCode": 13})  # fmt: skip


def text_of(browser, selector):
    return browser.run(f"document.querySelector({selector!r})?.textContent ?? ''")


IS_READY = "document.getElementById('state').textContent === 'ready'"
IS_DONE = "document.getElementById('stop').hidden && document.querySelectorAll('#turns .assistant').length"


@needs_browser
def test_one_picks_an_adapter_chats_stops_and_begins_anew(served, browser):
    browser.open(served.url)
    browser.until(IS_READY)
    options = browser.run("[...document.getElementById('model').options].map(o => o.value)")
    assert options == ["one", "two", "base"]
    assert browser.run("document.getElementById('key-row').hidden")
    browser.run("document.getElementById('model').value = 'two'")
    browser.run("document.getElementById('max-tokens').value = '12'")
    browser.run("document.getElementById('system').value = 'Sê breve.'")
    ask(browser, "Quem venceu <b>a partida</b>?")
    browser.until(f"{IS_DONE} === 1")
    assert text_of(browser, "#turns .user") == "Quem venceu <b>a partida</b>?"
    assert text_of(browser, "#turns .assistant")
    assert re.fullmatch(r"\d+ tokens · [\d.,]+ tokens/s", text_of(browser, "#speed"))
    served.logged("model=two tokens=")

    browser.run("document.getElementById('max-tokens').value = '400'")
    browser.run("document.getElementById('model').value = 'base'")
    ask(browser, "oi")
    browser.until("!document.getElementById('stop').hidden && "
                  "document.querySelectorAll('#turns .assistant')[1]?.textContent.length > 2")  # fmt: skip
    browser.run("document.getElementById('stop').click()")
    browser.until(IS_DONE)
    served.logged(" 499 ")
    browser.run("document.getElementById('reset').click()")
    assert browser.run("document.querySelectorAll('#turns li').length") == 0
    assert browser.errors == []


@needs_browser
def test_a_problem_is_said_and_the_question_can_be_asked_again(served, browser):
    browser.open(served.url)
    browser.until(IS_READY)
    browser.run("document.getElementById('max-tokens').value = '400000'")
    ask(browser, "oi")
    browser.until("document.getElementById('state').className === 'wrong'")
    assert "context_length" in text_of(browser, "#state")
    browser.run("document.getElementById('max-tokens').value = '4'")
    ask(browser, "oi")
    browser.until(f"{IS_DONE} === 1")
    browser.until(IS_READY)


@needs_browser
@pytest.mark.parametrize("width", [360, 1000])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_every_width_and_can_be_read_by_day_and_night(served, browser, tmp_path, width, scheme):
    browser.open(served.url, width=width, scheme=scheme)
    browser.until(IS_READY)
    browser.run("document.getElementById('max-tokens').value = '60'")
    ask(browser, "Uma pergunta bastante comprida sobre o estádio, " * 4 + "a" * 120)
    browser.until(f"{IS_DONE} === 1")
    assert browser.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    ratio = browser.run(CONTRAST)
    assert all(value >= 4.5 for value in ratio.values()), ratio
    unlabelled = browser.run(
        "[...document.querySelectorAll('input, select, textarea')].filter(e => !e.labels.length).length"
    )
    assert unlabelled == 0
    shots = Path(os.environ.get("MLX_QLORA_SCREENSHOTS", tmp_path))
    browser.screenshot(shots / f"page-{width}-{scheme}.png")


# WCAG 2.2's contrast of text and background, for each kind of text there is
CONTRAST = """(() => {
  const colour = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const found = colour(getComputedStyle(each).backgroundColor);
      if (found.length < 4 || found[3] > 0) return found;
    }
    return [255, 255, 255];
  };
  const found = {};
  for (const selector of ["body", "label", "#state", "#speed", "#turns .user", "#turns .assistant", "#send",
                          "#reset", "#model", "#question"]) {
    const element = document.querySelector(selector);
    const [a, b] = [light(colour(getComputedStyle(element).color)), light(behind(element))];
    found[selector] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }
  return found;
})()"""


@needs_browser
def test_a_server_with_a_key_asks_for_it_in_the_browsers_language(tiny_llama_folder, tmp_path):
    browser = Browser(tmp_path / "profile", "pt-PT")
    try:
        with serving(tiny_llama_folder, key=KEY) as served:
            browser.open(served.url)
            browser.until(
                "document.getElementById('state').textContent === 'Este servidor precisa da chave.'"
            )
            assert browser.run("document.documentElement.lang") == "pt"
            assert not browser.run("document.getElementById('key-row').hidden")
            assert browser.run("document.getElementById('key').type") == "password"
            browser.run("document.getElementById('key').focus()")
            browser.send("Input.insertText", {"text": KEY})
            browser.run("document.getElementById('key').blur()")
            browser.until("document.getElementById('state').textContent === 'pronto'")
            browser.run("document.getElementById('max-tokens').value = '4'")
            ask(browser, "oi")
            browser.until(f"{IS_DONE} === 1")
            assert KEY not in "".join(served.log)
    finally:
        browser.close()


def test_the_page_loads_nothing_from_elsewhere_and_no_script_may_be_written_into_it(served):
    with served.client() as client:
        page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for file in PAGE.iterdir():
        content = file.read_text(encoding="utf-8")
        assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|document\.write|eval\(", content), file
    assert not re.search(r"<script(?![^>]*src=)|<style| on\w+=| style=", page.text)


def test_both_languages_say_everything():
    script = (PAGE / "app.js").read_text(encoding="utf-8")
    english, portuguese = (
        set(
            re.findall(
                r"^    (\w+):", re.search(rf"^  {name}: {{\n(.*?)^  }},", script, re.S | re.M)[1], re.M
            )
        )
        for name in ("en", "pt")
    )
    wanted = set(re.findall(r"\btext\.(\w+)", script))
    wanted |= set(re.findall(r'data-(?:text|hint|label)="(\w+)"', (PAGE / "index.html").read_text()))
    assert english == portuguese == wanted
