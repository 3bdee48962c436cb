"""Requests that end mlx_lm.server, or worse: each is refused, and the next good one is answered."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.served import chat

LONG_INTEGER = b"9" * 5000
DEEP = b"[" * 100_000
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def text(**more):
    return {"model": "base", "prompt": "o clube", "max_tokens": 4, **more}


@pytest.fixture(autouse=True)
def alive(served):
    """After whatever a test sent, a good request is answered by the same process."""
    yield
    with served.client() as client:
        answer = client.post(CHAT, json=chat("one"))
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] >= 1
    assert served.process.poll() is None


def refused(served, path, body, *, status=422, **options):
    with served.client() as client:
        kind = {"json": body} if not isinstance(body, bytes) else {"content": body}
        headers = {"Content-Type": "application/json"}
        response = client.post(path, **kind, headers={**headers, **options.pop("headers", {})}, **options)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["message"]
    assert error.keys() >= {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, chat(stop=[1, 2]), "stop"),
        (TEXT, text(stop=[1, 2]), "stop"),
        (CHAT, chat(stop=""), "stop"),
        (CHAT, chat(top_k=10**9), "top_k"),
        (TEXT, text(top_k=321), "top_k"),
        (TEXT, text(prompt=""), "prompt"),
        (TEXT, text(prompt=[]), "prompt"),
        (TEXT, text(prompt=[[]]), "prompt"),
        (TEXT, text(prompt=[1, "a"]), "prompt"),
        (TEXT, text(prompt=[10**6]), "prompt"),
        (TEXT, text(prompt=[-1]), "prompt"),
        (CHAT, chat(logit_bias={"1000000": 5}), "logit_bias"),
        (TEXT, text(logit_bias={"320": 5}), "logit_bias"),
        (CHAT, chat(logit_bias={"-1": 5}), "logit_bias"),
        (CHAT, chat(logit_bias={"1": 101}), "logit_bias"),
        (CHAT, chat(max_tokens=0), "max_tokens"),
        (CHAT, chat(max_tokens=10**30), "max_tokens"),
        (CHAT, chat(max_tokens=500), "max_tokens"),
        (CHAT, chat(temperature=-1), "temperature"),
        (CHAT, chat(temperature="hot"), "temperature"),
        (CHAT, chat(top_p=0), "top_p"),
        (CHAT, chat(n=2), "n"),
        (CHAT, chat(seed=2**70), "seed"),
        (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs"),
        (CHAT, chat(messages=[]), "messages"),
        (CHAT, chat(messages="oi"), "messages"),
        (CHAT, chat(messages=[{"role": "user", "content": None}]), "messages"),
        (CHAT, chat(messages=[{"role": "wizard", "content": "oi"}]), "messages"),
        (CHAT, chat(tools=[{"type": "function"}]), "tools"),
        (CHAT, chat(response_format={"type": "json_object"}), "response_format"),
        (CHAT, chat(max_token=3), "max_token"),
        (CHAT, chat(content="a" * 4000), "prompt"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_422_with_its_fields_name(served, path, body, param):
    assert refused(served, path, body)["param"] == param


def test_as_many_prompts_as_the_limit_are_answered_and_one_more_is_refused(served):
    with served.client() as client:
        answer = client.post(TEXT, json=text(prompt=["o clube"] * 16, max_tokens=1))
    assert [choice["index"] for choice in answer.json()["choices"]] == list(range(16))
    error = refused(served, TEXT, text(prompt=["o clube"] * 17))
    assert error["limit"] == {"name": "prompts", "value": 16}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"NaN",
        b'{"model": "base", "prompt": "a", "temperature": NaN}',
        b'{"model": "base", "prompt": "a", "temperature": -Infinity}',
        b'{"model": "base", "prompt": "a", "seed": ' + LONG_INTEGER + b"}",
        b'{"model": "base", "prompt": "\xff\xfe"}',
        b'\xef\xbb\xbf{"model": "base", "prompt": "a"}',
        b'{"model": "base", "prompt": "\\ud800"}',
        b'{"model": "base", "prompt": "a", "\\udc00": 1}',
        b'{"model": "base", "prompt": "a", "metadata": ' + DEEP + b"}",
        b'{"model": "base", "prompt": "a", "metadata": ' + DEEP + b"]" * len(DEEP) + b"}",
    ],
    ids=lambda body: repr(body[:60]),
)
def test_what_is_not_json_in_utf8_is_400(served, body):
    assert refused(served, TEXT, body, status=400)["code"] == "invalid_json"


@pytest.mark.parametrize("body", [b"[]", b"null", b"3", b'"a"', b"{}", b'{"model": "base", "prompt": 1e999}'])
def test_json_that_is_no_request_is_422(served, body):
    refused(served, TEXT, body)


def test_a_number_too_large_for_a_float_is_422(served):
    body = b'{"model": "base", "prompt": "a", "temperature": 1e999}'
    assert refused(served, TEXT, body)["param"] == "temperature"


def test_text_beside_the_basic_plane_is_answered(served):
    with served.client() as client:
        body = b'{"model": "base", "prompt": "\\ud83d\\ude00 \xf0\x9f\x98\x80\\u0000", "max_tokens": 2}'
        answer = client.post(TEXT, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200, answer.text


class _Fetched(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.num_requests += 1
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def web():
    """An HTTP server that counts what is fetched from it."""
    server = HTTPServer(("127.0.0.1", 0), _Fetched)
    server.num_requests = 0
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_no_address_in_a_message_is_fetched(served, web, kind):
    url = f"http://127.0.0.1:{web.server_port}/secret"
    part = {"type": kind, kind: {"url": url}}
    error = refused(served, CHAT, chat(messages=[{"role": "user", "content": [part]}]))
    assert kind in error["message"]
    assert web.num_requests == 0


@pytest.mark.parametrize(
    "name", ["/etc", "../..", "https://example.org/model", "mistralai/Mistral-7B-v0.1", "", "One", "one "]
)
def test_a_model_that_was_not_named_at_the_start_is_404_with_the_names(served, name):
    error = refused(served, CHAT, chat(name), status=404)
    assert error["code"] == "model_not_found"
    for known in ("base", "tiny-llama", "one", "two"):
        assert known in error["message"]


def test_neither_an_adapters_folder_nor_the_models_is_told_to_clients(served, tiny_llama_folder):
    with served.client() as client:
        told = client.get("/v1/models").text + client.get("/openapi.json").text + client.get("/").text
    assert str(tiny_llama_folder.parent) not in told


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_over_the_limit_is_413_with_the_limit(served, is_chunked):
    body = json.dumps(chat(content="a" * 300_000)).encode()
    parts = (body[i : i + 50_000] for i in range(0, len(body), 50_000))
    with served.client() as client:
        response = client.post(
            CHAT, content=parts if is_chunked else body, headers={"Content-Type": "application/json"}
        )
    assert response.status_code == 413
    assert response.json()["error"]["limit"] == {"name": "body_bytes", "value": 262144}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Encoding": "gzip"}, 415),
        ({"Host": "evil.example"}, 421),
        ({"Host": "localhost.evil.example:8080"}, 421),
        ({"Host": ""}, 421),
        ({"Host": "[::1"}, 421),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
    ids=str,
)
def test_a_request_a_foreign_page_could_send_is_refused(served, headers, status):
    refused(served, CHAT, chat(), status=status, headers=headers)


def test_a_page_of_another_origin_gets_no_permission_to_read(served):
    with served.client() as client:
        preflight = client.options(CHAT, headers={"Origin": "https://evil.example",
                                                  "Access-Control-Request-Method": "POST"})  # fmt: skip
        listing = client.get("/v1/models", headers={"Origin": "https://evil.example"})
    assert preflight.status_code >= 400
    for response in (preflight, listing):
        assert not any(name.startswith("access-control") for name in response.headers)


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /%ff%00%0a HTTP/1.0\r\nHost: localhost\r\n\r\n",
    ],
    ids=lambda raw: repr(raw[:40]),
)
def test_what_is_not_http_is_refused(served, raw):
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert not answer or answer.split(b" ")[1][:1] == b"4"


def test_the_log_has_neither_prompts_nor_line_breaks_of_a_clients_making(served):
    with served.client() as client:
        client.post(CHAT + "?secret=1", json=chat(content="unrepeatable"))
        client.get("/a%0a2026-01-01T00:00:00Z 127.0.0.1 GET /forged 200")
    log = served.logged("/a%0A2026-01-01T00:00:00Z%20127.0.0.1%20GET%20/forged")
    assert "unrepeatable" not in log
    assert "secret" not in log
