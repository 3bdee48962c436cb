"""machine/hub.py: a real client against a server on the loopback"""

import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mlx_qlora.machine import hub as module
from mlx_qlora.machine.hub import download, hub
from tests.hub_server import serve

TOKEN = "hf_" + "q" * 30


def only(findings):
    (finding,) = findings
    return finding


@contextmanager
def answering(status=200, body=b"{}", delay=0.0):
    """A server that answers any request so, and the requests it got."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers.get("authorization")))
            time.sleep(delay)
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments):
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def client(monkeypatch, tmp_path):
    """Point the hub's client somewhere: client(url, token)."""
    import huggingface_hub
    from huggingface_hub import close_session, constants

    def point(url, token=None):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
        close_session()

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield point
    close_session()


def test_an_endpoint_that_answers_is_right_and_asked_once(client):
    with answering() as (url, asked):
        client(url)
        found = only(hub())
    assert found.status == "ok"
    assert found.text == f"{url} answers; not signed in, so public models only"
    assert asked == [("/api/models?limit=1", None)]


def test_a_token_is_sent_and_its_owner_shown_but_never_the_token(client):
    with answering(body=b'{"name": "ana"}') as (url, asked):
        client(url, TOKEN)
        found = only(hub())
    assert asked == [("/api/whoami-v2", f"Bearer {TOKEN}")]
    assert found.text == f"{url} answers, signed in as ana"
    assert TOKEN not in repr(found)


def test_a_refused_token_is_a_warning_without_the_token(client):
    with answering(401) as (url, _):
        client(url, TOKEN)
        found = only(hub())
    assert (found.status, found.run) == ("warning", "hf auth login")
    assert TOKEN not in repr(found)


def test_a_server_in_trouble_is_a_warning(client):
    with answering(503) as (url, _):
        client(url)
        found = only(hub())
    assert found.status == "warning"
    assert "status 503" in found.text


def test_no_server_is_a_warning_with_a_command_to_look_further(client):
    with answering() as (url, _):
        pass
    client(url)
    found = only(hub())
    assert found.status == "warning"
    assert "does not answer" in found.text
    assert found.run.startswith(f"curl -sSI --max-time 10 {url} ")


def test_a_server_that_never_answers_is_waited_for_no_longer_than_said(client):
    with answering(delay=3) as (url, _):
        client(url)
        began = time.monotonic()
        found = only(hub(seconds=0.3))
        took = time.monotonic() - began
    assert found.status == "warning"
    assert took < 2


def test_a_lookup_that_hangs_is_not_waited_for_either(client, monkeypatch):
    client("http://127.0.0.1:1")
    monkeypatch.setattr(module, "_fetched", lambda *_arguments: time.sleep(5))
    began = time.monotonic()
    assert "no answer in 0.1 s" in only(hub(seconds=0.1)).text
    assert time.monotonic() - began < 3


def test_offline_nothing_is_asked(client, monkeypatch):
    from huggingface_hub import constants

    with answering() as (url, asked):
        client(url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        found = only(hub())
        assert list(download("ana/model")) == []
    assert (found.status, asked) == ("ok", [])
    assert "HF_HUB_OFFLINE" in found.run


def test_a_password_in_the_endpoint_is_not_shown(client):
    with answering() as (url, _):
        client(url.replace("http://", "http://ana:secret@"))
        found = only(hub())
    assert "secret" not in repr(found)
    assert url in found.text


def test_weights_to_fetch_are_counted_and_weighed_against_the_disk(client, monkeypatch):
    with serve() as stand_in:
        files = {
            "model-00001.safetensors": b"x" * 3000,
            "model-00002.safetensors": b"x" * 2000,
            "README.md": b"x",
        }
        stand_in.add("ana/model", files)
        client(stand_in.url)
        found = only(download("ana/model"))
        assert (found.status, found.facts["download_bytes"]) == ("ok", 5000)
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _path: type("Usage", (), {"free": 4999}))
        assert only(download("ana/model")).status == "problem"
        assert list(download("ana/none")) == []


def test_a_folder_is_not_asked_about(client, tmp_path):
    with answering() as (url, asked):
        client(url)
        assert list(download(str(tmp_path))) == []
    assert asked == []
