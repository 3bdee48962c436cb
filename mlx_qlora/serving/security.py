"""Who may ask, from where, and how much: host names, origins, the key, the body.

A browser is the danger on loopback: any page may send requests to this machine. The Host check stops DNS
rebinding; the Origin check and JSON's content type, which a form cannot send, stop requests of other pages.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from mlx_qlora.errors import ConfigError
from mlx_qlora.serving.limits import Limits, Refusal, over_limit

KEY_VARIABLE = "MLX_QLORA_API_KEY"
MIN_KEY_LENGTH = 16
PUBLIC_PATHS = frozenset({"/", "/app.js", "/style.css", "/health"})
"""Answered without a key: the page asks for one, and a load balancer has none."""
_INLINE_BODY_BYTES = 64 * 1024


def read_key(key_file: Path | None) -> str | None:
    """The bearer key clients must send: the file's only line, or the environment's; None without either.

    Raises:
        ConfigError: both are given, the file cannot be read, or the key is short or not printable ASCII.
    """
    inherited = os.environ.get(KEY_VARIABLE)
    if key_file is None and inherited is None:
        return None
    make = "(umask 077; openssl rand -hex 32 > key.txt) && mlx-qlora serve … --api-key-file key.txt"
    if key_file is not None and inherited is not None:
        raise ConfigError(
            f"There are two keys: --api-key-file and {KEY_VARIABLE}.", run=f"unset {KEY_VARIABLE}"
        )
    try:
        key = inherited if key_file is None else key_file.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The key cannot be read: {error}.", where=str(key_file), run=make) from None
    key = (key or "").strip()
    if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"The key needs at least {MIN_KEY_LENGTH} printable ASCII characters and no space.",
            where=KEY_VARIABLE if key_file is None else str(key_file),
            run=make,
        )
    return key


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_exposure(host: str, key: str | None, origins: Sequence[str]) -> None:
    """Refuse to be open to others without a key.

    Raises:
        ConfigError: the address is reachable from elsewhere, or any web page may ask, and there is no key;
            or an origin is not one.
    """
    make = f"{KEY_VARIABLE}=$(openssl rand -hex 32) mlx-qlora serve …"
    if key is None and not is_loopback(host):
        raise ConfigError(f"{host} can be reached from other machines, and there is no key.", run=make)
    if key is None and "*" in origins:
        raise ConfigError("--allow-origin '*' lets any web page ask, and there is no key.", run=make)
    for origin in origins:
        parts = urlsplit(origin)
        if origin != "*" and (
            not parts.scheme or not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}"
        ):
            raise ConfigError(
                f"{origin!r} is no origin.", run="mlx-qlora serve … --allow-origin https://example.org"
            )


def refusal_response(refusal: Refusal) -> JSONResponse:
    """In ASCII: a message may repeat what no UTF-8 can hold."""
    response = JSONResponse(None, refusal.status, refusal.headers)
    response.body = json.dumps(refusal.body()).encode("ascii")
    response.headers["content-length"] = str(len(response.body))
    return response


class HostCheck:
    """Refuses requests that reached this server under another's name, or from a page of another's.

    An address in digits is never a rebound name, so every one is taken.

    Args:
        names: Host names that are this server's.
        origins: Origins whose pages may ask; "*" for all.
    """

    def __init__(self, app: ASGIApp, names: Collection[str], origins: Collection[str]) -> None:
        self.app = app
        self.names = {name.lower() for name in names} | {"localhost"}
        self.origins = set(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 421 or 403."""
        refusal = self._problem(scope) if scope["type"] == "http" else None
        await (refusal_response(refusal) if refusal else self.app)(scope, receive, send)

    def _problem(self, scope: Scope) -> Refusal | None:
        host = header(scope, b"host")
        if host is None or not self._is_ours(host):
            return Refusal(
                421,
                "This server is not known under that Host. Start it with --allow-host NAME if it should be.",
                code="host",
            )
        origin = header(scope, b"origin")
        if (
            origin is None
            or scope["method"] in ("GET", "HEAD")
            or "*" in self.origins
            or origin in self.origins
        ):
            return None
        if urlsplit(origin).netloc.lower() == host.lower():
            return None
        return Refusal(
            403, "Pages of that origin may not ask. Start with --allow-origin to let them.", code="origin"
        )

    def _is_ours(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if name in self.names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class KeyCheck:
    """Refuses requests without the bearer key, but for `PUBLIC_PATHS`. The comparison takes constant time.

    Args:
        key: None lets everyone in.
    """

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self.app = app
        self.digest = None if key is None else _digest(key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] == "http" and self.digest is not None and scope["path"] not in PUBLIC_PATHS:
            scheme, _, given = (header(scope, b"authorization") or "").partition(" ")
            # digests, so that neither content nor length is told by the time it takes
            is_right = hmac.compare_digest(_digest(given.strip()), self.digest)
            if not is_right or scheme.lower() != "bearer":
                refusal = Refusal(
                    401,
                    "This server needs its key: Authorization: Bearer KEY.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await refusal_response(refusal)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def header(scope: Scope, name: bytes) -> str | None:
    """A request's header; None when it is absent or there are several, which no honest client sends."""
    values = [value for each, value in scope["headers"] if each == name]
    return values[0].decode("latin-1") if len(values) == 1 else None


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


async def read_json(request: Request, limits: Limits) -> Any:
    """The request's body, within its limits in bytes and time, as JSON and nothing but JSON.

    Raises:
        Refusal: 408, 413, 415, or 400 for what is not JSON in UTF-8.
        ClientDisconnect: the client left.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "Send JSON, with the header Content-Type: application/json.", code="content_type")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Refusal(415, "Send the body as it is, without Content-Encoding.", code="content_encoding")
    body = await _read_body(request, limits)
    # a large body is parsed beside the event loop, or every stream would wait
    return _parse(body) if len(body) <= _INLINE_BODY_BYTES else await asyncio.to_thread(_parse, body)


async def _read_body(request: Request, limits: Limits) -> bytes:
    too_large = over_limit(
        413, limits, "body_bytes", "The body is too large", headers={"Connection": "close"}
    )
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > limits.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        raise over_limit(
            408, limits, "body_seconds", "The body came too slowly", headers={"Connection": "close"}
        ) from None
    return bytes(body)


def _parse(body: bytes) -> Any:
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
        if b"\\ud" in body.lower():  # half of a surrogate pair is no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except RecursionError:
        problem = "it is nested too deeply"
    except UnicodeEncodeError:
        problem = "half of a surrogate pair"
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError, too many digits
        problem = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    raise Refusal(400, f"The body is not JSON in UTF-8: {problem}.", code="invalid_json")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


__all__ = [
    "KEY_VARIABLE",
    "PUBLIC_PATHS",
    "ClientDisconnect",
    "HostCheck",
    "KeyCheck",
    "check_exposure",
    "header",
    "is_loopback",
    "read_json",
    "read_key",
    "refusal_response",
]
