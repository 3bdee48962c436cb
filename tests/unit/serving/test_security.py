import asyncio
import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from mlx_qlora.errors import ConfigError
from mlx_qlora.serving.limits import Limits, Refusal
from mlx_qlora.serving.security import (
    HostCheck,
    KeyCheck,
    check_exposure,
    is_loopback,
    read_json,
    read_key,
    refusal_response,
)

KEY = "a-key-of-more-than-16"


def scope(method="POST", path="/v1/models", **headers):
    pairs = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http", "method": method, "path": path, "headers": pairs, "query_string": b""}


def status_through(check, request_scope, **settings):
    """The status a request gets from a middleware before an application that answers 200."""
    statuses = []

    async def application(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    asyncio.run(check(application, **settings)(request_scope, None, send))
    return statuses[0]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("LOCALHOST:8080", 200), ("localhost.", 200), ("127.0.0.1:80", 200),
        ("[::1]:8080", 200), ("192.168.1.7:8080", 200), ("box.example", 200), ("BOX.example:1", 200),
        ("evil.example", 421), ("localhost.evil.example", 421), ("127.0.0.1.evil.example", 421),
        ("evil.example@localhost", 200), ("localhost@evil.example", 421), ("", 421), ("[::1", 421),
        ("127.1", 421), ("0x7f000001", 421), ("box.example/x", 200), ("ex ample", 421),
    ],
)  # fmt: skip
def test_only_this_servers_names_and_addresses_in_digits_are_its_host(host, status):
    assert status_through(HostCheck, scope(host=host), names=("box.example",), origins=()) == status


def test_two_hosts_or_none_are_refused():
    two = scope(host="localhost")
    two["headers"].append((b"host", b"evil.example"))
    assert status_through(HostCheck, two, names=(), origins=()) == 421
    assert status_through(HostCheck, scope(), names=(), origins=()) == 421


@pytest.mark.parametrize(
    ("origin", "origins", "method", "status"),
    [
        ("http://localhost:8080", (), "POST", 200),
        ("http://evil.example", (), "POST", 403),
        ("http://localhost:9", (), "POST", 403),
        ("null", (), "POST", 403),
        ("http://evil.example", (), "GET", 200),
        ("https://page.example", ("https://page.example",), "POST", 200),
        ("https://other.example", ("https://page.example",), "POST", 403),
        ("https://other.example", ("*",), "POST", 200),
    ],
)
def test_pages_of_other_origins_may_not_post_unless_they_are_allowed(origin, origins, method, status):
    asked = scope(method, host="localhost:8080", origin=origin)
    assert status_through(HostCheck, asked, names=(), origins=origins) == status


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(codec="latin-1"), max_size=40))
def test_only_the_key_itself_opens(given_key):
    opens = status_through(KeyCheck, scope(authorization=f"Bearer {given_key}"), key=KEY) == 200
    assert opens == (given_key.strip() == KEY)


@pytest.mark.parametrize(
    ("authorization", "status"),
    [(f"Bearer {KEY}", 200), (f"bearer {KEY}", 200), (f"Basic {KEY}", 401), (KEY, 401), ("Bearer", 401)],
)
def test_the_key_is_a_bearer_token(authorization, status):
    assert status_through(KeyCheck, scope(authorization=authorization), key=KEY) == status


def test_the_key_is_not_asked_for_where_everyone_may_look_and_nowhere_without_one():
    for path in ("/", "/app.js", "/style.css", "/health"):
        assert status_through(KeyCheck, scope(path=path), key=KEY) == 200
    for path in ("/v1/models", "/metrics", "/health/", "//", "/openapi.json"):
        assert status_through(KeyCheck, scope(path=path), key=KEY) == 401
    assert status_through(KeyCheck, scope(), key=None) == 200


def test_a_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("MLX_QLORA_API_KEY", raising=False)
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    assert read_key(None) is None
    assert read_key(file) == KEY
    monkeypatch.setenv("MLX_QLORA_API_KEY", KEY + "2")
    assert read_key(None) == KEY + "2"
    with pytest.raises(ConfigError, match="two keys"):
        read_key(file)


@pytest.mark.parametrize(
    "key", ["", "short", "a" * 15, "with a space in it here", "não-é-ascii-não-é-ascii", "a\nb" * 9]
)
def test_a_key_that_is_no_key_is_refused_and_not_repeated(key, monkeypatch):
    monkeypatch.setenv("MLX_QLORA_API_KEY", key)
    with pytest.raises(ConfigError, match="at least 16") as caught:
        read_key(None)
    assert len(key) < 3 or key not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "inside"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),
     ("::", False), ("192.168.0.2", False), ("localhost.example", False), ("", False)],
)  # fmt: skip
def test_only_loopback_may_be_without_a_key(host, inside):
    assert is_loopback(host) == inside
    check_exposure(host, KEY, [])
    if inside:
        check_exposure(host, None, ["https://page.example"])
    else:
        with pytest.raises(ConfigError, match="no key"):
            check_exposure(host, None, [])


def test_every_page_may_ask_only_with_a_key():
    check_exposure("127.0.0.1", KEY, ["*"])
    with pytest.raises(ConfigError, match="no key"):
        check_exposure("127.0.0.1", None, ["*"])


@pytest.mark.parametrize("origin", ["example.org", "https://example.org/", "https://", "null", ""])
def test_an_origin_is_a_scheme_and_a_host(origin):
    with pytest.raises(ConfigError, match="no origin"):
        check_exposure("127.0.0.1", KEY, [origin])


def reading(*parts, limits=None, pause=0.0, **headers):
    """What read_json makes of a body that comes in parts."""

    async def read():
        left = list(parts)

        async def receive():
            if pause and len(left) < len(parts):
                await asyncio.sleep(pause)
            part = left.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(left)}

        return await read_json(
            Request(scope(**{"content_type": "application/json", **headers}), receive), limits or Limits()
        )

    return asyncio.run(read())


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=50, deadline=None)
@given(value=JSON, is_ascii=st.booleans())
def test_whatever_is_json_is_read_as_it_was_written(value, is_ascii):
    assert reading(json.dumps(value, ensure_ascii=is_ascii).encode()) == value


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=60))
def test_whatever_bytes_come_they_are_json_or_refused(body):
    try:
        value = reading(body)
    except Refusal as refusal:
        assert refusal.status == 400
    else:
        assert json.loads(body.decode()) == value or value != value


@settings(max_examples=50, deadline=None)
@given(value=JSON)
def test_a_refusal_can_always_be_sent(value):
    refusal = Refusal(422, f"{value!r} \ud800", limit=("x", 1))
    response = refusal_response(refusal)
    assert json.loads(response.body) == refusal.body()
    assert int(response.headers["content-length"]) == len(response.body)


@pytest.mark.parametrize(
    "body",
    [
        b"NaN",
        b"[Infinity]",
        b'{"a": -Infinity}',
        b'"\\ud800"',
        b'{"\\uDC00": 1}',
        b"[" * 10**5,
        b"9" * 5000,
        b"",
    ],
    ids=lambda body: repr(body[:20]),
)
def test_what_pythons_parser_takes_or_falls_over_and_is_no_json_is_refused(body):
    with pytest.raises(Refusal) as caught:
        reading(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


def test_a_body_at_the_limit_is_read_and_one_byte_more_is_not():
    limits = Limits(body_bytes=8)
    assert reading(b'"12345', b'6"', limits=limits) == "123456"
    for headers in ({}, {"content_length": "9"}, {"content_length": "9" * 30}):
        with pytest.raises(Refusal) as caught:
            reading(b'"1234567"', limits=limits, **headers)
        assert (caught.value.status, caught.value.limit) == (413, ("body_bytes", 8))
        assert caught.value.headers["Connection"] == "close"


def test_a_body_larger_than_what_is_parsed_in_the_loop_is_read_too():
    value = ["palavra"] * 20_000
    assert reading(json.dumps(value).encode()) == value


def test_a_body_that_comes_too_slowly_is_408():
    with pytest.raises(Refusal) as caught:
        reading(b"[1,", b"2]", limits=Limits(body_seconds=0.05), pause=5)
    assert (caught.value.status, caught.value.limit) == (408, ("body_seconds", 0.05))


@pytest.mark.parametrize("kind", ["text/plain", "application/jsonp", "", "multipart/form-data"])
def test_what_a_form_can_send_is_no_json(kind):
    with pytest.raises(Refusal) as caught:
        reading(b"{}", content_type=kind)
    assert caught.value.status == 415


def test_a_charset_may_be_named_and_compression_may_not():
    assert reading(b"{}", content_type="Application/JSON; charset=utf-8") == {}
    with pytest.raises(Refusal) as caught:
        reading(gzip.compress(b"{}"), content_encoding="gzip")
    assert caught.value.status == 415
