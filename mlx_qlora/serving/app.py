"""The HTTP interface: OpenAI's endpoints over an `Engine`, its health, its metrics, and a page to try it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from mlx_qlora.dataset.rows import BadRow
from mlx_qlora.errors import ConfigError, MlxQloraError
from mlx_qlora.serving.access_log import CLIENT_LEFT, AccessLog
from mlx_qlora.serving.admission import job_of
from mlx_qlora.serving.answers import ChatForm, TextForm, encoded
from mlx_qlora.serving.jobs import EngineStopped, Job, QueueFull
from mlx_qlora.serving.limits import Limits, Refusal, over_limit
from mlx_qlora.serving.metrics import Metrics
from mlx_qlora.serving.openapi import describe
from mlx_qlora.serving.schema import ChatRequest, CompletionRequest, Generation, parsed
from mlx_qlora.serving.security import ClientDisconnect, HostCheck, KeyCheck, read_json, refusal_response
from mlx_qlora.serving.streaming import EventStream, Mailbox, Reply, collect, watched

if TYPE_CHECKING:
    from mlx_qlora.serving.engine import Engine

BASE = "base"
"""The name of the base model without an adapter."""
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}
_PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
}


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may ask."""

    key: str | None = None
    """Bearer key; None lets everyone in who reaches the address."""
    names: tuple[str, ...] = ()
    """Host names that are this server's, besides localhost and addresses in digits."""
    origins: tuple[str, ...] = ()
    """Origins whose pages may ask."""


@dataclass(kw_only=True)
class Service:
    """What all requests share."""

    engine: Engine
    metrics: Metrics
    limits: Limits
    names: Mapping[str, str | None]
    """What a request's `model` may be, and the adapter it means; None is the base alone."""
    is_draining: bool = False
    log: Callable[[str], None] = lambda _: None
    started_at: int = field(default_factory=lambda: int(time.time()))
    open_replies: set[Reply] = field(default_factory=set)
    _mailbox: Mailbox | None = None

    def adapter_named(self, name: str) -> str | None:
        """The adapter `name` means.

        Raises:
            Refusal: 404 with the names there are.
        """
        if name not in self.names:
            raise Refusal(
                404,
                f"There is no model {name!r} here; there are: {', '.join(self.names)}.",
                param="model",
                code="model_not_found",
            )
        return self.names[name]

    async def tokens_of(self, wanted: Generation) -> list[list[int]]:
        """Each prompt as tokens, made beside the event loop.

        Raises:
            Refusal: a chat template or the tokenizer does not take it.
        """
        adapter = self.adapter_named(wanted.model)
        try:
            if isinstance(wanted, ChatRequest):
                turns = [message.as_turn() for message in wanted.messages]
                return [await asyncio.to_thread(self.engine.render, adapter, turns)]
            if isinstance(wanted, CompletionRequest):
                if len(wanted.prompts) > self.limits.prompts:
                    raise over_limit(
                        422, self.limits, "prompts", "There are too many prompts", param="prompt"
                    )
                return [
                    await asyncio.to_thread(self.engine.encode, each) if isinstance(each, str) else each
                    for each in wanted.prompts
                ]
        except (BadRow, ConfigError) as error:
            param = "messages" if isinstance(wanted, ChatRequest) else "prompt"
            message = error.what if isinstance(error, ConfigError) else str(error)
            raise Refusal(422, f"{param}: {message}", param=param, code="prompt") from None
        raise TypeError(type(wanted))

    def submit(self, jobs: Sequence[Job]) -> Reply:
        """Queue the jobs of one request, all or none.

        Raises:
            Refusal: 422, 429 or 503.
        """
        if self._mailbox is None:
            self._mailbox = Mailbox(asyncio.get_running_loop())
        reply = Reply(self._mailbox, len(jobs), limits=self.limits)
        try:
            for index, job in enumerate(jobs):
                reply.hold(self.engine.submit(job, reply.listener(index)))
        except MlxQloraError as error:
            reply.cancel()
            raise _refusal_of(error) from None
        self.open_replies.add(reply)
        return reply

    def fail_all(self, message: str) -> None:
        """End every open answer with an error: no more will come."""
        self.is_draining = True
        for reply in list(self.open_replies):
            reply.fail(Refusal(503, message, code="stopping"))

    async def answer(self, request: Request, kind: type[Generation]) -> Response:
        """One request of /v1/chat/completions or /v1/completions, from body to answer."""
        if self.is_draining:
            raise Refusal(503, "The server is stopping.", code="stopping", retry_after_seconds=5,
                          headers={"Connection": "close"})  # fmt: skip
        wanted = parsed(kind, await read_json(request, self.limits))
        adapter = self.adapter_named(wanted.model)
        request.state.served = wanted.model
        prompts = await self.tokens_of(wanted)
        jobs = [job_of(wanted, adapter, tokens, engine=self.engine, limits=self.limits) for tokens in prompts]
        reply = self.submit(jobs)
        form = (ChatForm if isinstance(wanted, ChatRequest) else TextForm)(
            wanted.model,
            has_logprobs=wanted.num_top_logprobs is not None,
            includes_usage=wanted.includes_usage,
        )
        request.state.reply = reply
        if wanted.stream:
            return EventStream(reply, form, on_end=lambda: self.open_replies.discard(reply))
        try:
            async with watched(reply, request.receive):
                choices = await collect(reply)
        finally:
            self.open_replies.discard(reply)
        return _json(form.whole(choices), CLIENT_LEFT if reply.is_gone else 200)


def public_name(model: str) -> str:
    """What clients call the base: its hub id, or its folder's name without where it is."""
    return Path(model).resolve().name if Path(model).exists() else model


def served_names(model_name: str, adapters: Sequence[str]) -> dict[str, str | None]:
    """What a request's `model` may be.

    Raises:
        ConfigError: an adapter has the base's name.
    """
    for name in (BASE, model_name):
        if name in adapters:
            raise ConfigError(
                f"{name!r} is the base model's name; an adapter needs another.",
                run="mlx-qlora serve --model M --adapter NAME=PATH",
            )
    return {BASE: None, model_name: None, **{name: name for name in adapters}}


def build_app(service: Service, access: Access) -> FastAPI:
    """The ASGI application."""
    app = FastAPI(title="mlx-qlora", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    _add_routes(app, service)
    description = encoded(describe(service.names, service.limits, needs_key=access.key is not None))

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return Response(description, media_type="application/json")

    app.exception_handler(Refusal)(_on_refusal)
    app.exception_handler(ClientDisconnect)(_on_disconnect)
    app.exception_handler(HTTPException)(_on_http_exception)
    app.exception_handler(Exception)(_on_bug)
    # the one added last is the first to see a request
    app.add_middleware(KeyCheck, key=access.key)
    if access.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(access.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    app.add_middleware(HostCheck, names=access.names, origins=access.origins)
    app.add_middleware(AccessLog, log=service.log, count=service.metrics.count_response)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await service.answer(request, ChatRequest)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await service.answer(request, CompletionRequest)

    def card(name: str) -> dict[str, Any]:
        parent = None if service.names[name] is None else BASE
        made = {"object": "model", "created": service.started_at, "owned_by": "mlx-qlora"}
        return {"id": name, **made, "parent": parent}

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [card(name) for name in service.names]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.adapter_named(name)
        return _json(card(name))

    @app.get("/health")
    async def health() -> Response:
        is_well = service.engine.stats().is_alive and not service.is_draining
        status = "ok" if is_well else "stopping"
        return _json({"status": status}, 200 if is_well else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"content-type": Metrics.content_type})

    folder = files("mlx_qlora.serving") / "page"
    for path, (name, kind) in _PAGE_FILES.items():
        app.add_api_route(path, _page((folder / name).read_bytes(), kind), methods=["GET"])


def _page(content: bytes, kind: str) -> Callable[[], Any]:
    async def page() -> Response:
        return Response(content, headers={**PAGE_HEADERS, "Content-Type": kind})

    return page


def _json(value: Any, status: int = 200) -> Response:
    return Response(encoded(value), status, media_type="application/json")


def _refusal_of(error: MlxQloraError) -> Refusal:
    if isinstance(error, QueueFull):
        return Refusal(429, f"Too many requests wait (max_queue = {error.limit}).", code="max_queue",
                       limit=("max_queue", error.limit), retry_after_seconds=1)  # fmt: skip
    if isinstance(error, EngineStopped):
        return Refusal(503, "The server is stopping.", code="stopping", retry_after_seconds=5)
    return Refusal(422, error.what, code="invalid_value")


async def _on_refusal(request: Request, refusal: Exception) -> Response:  # noqa: ARG001
    if not isinstance(refusal, Refusal):
        raise refusal
    return refusal_response(refusal)


async def _on_disconnect(request: Request, error: Exception) -> Response:  # noqa: ARG001
    return Response(status_code=CLIENT_LEFT)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    message = {404: "There is nothing here.", 405: f"{request.method} is not served here."}
    return refusal_response(
        Refusal(
            error.status_code,
            message.get(error.status_code, str(error.detail)),
            headers=dict(error.headers or {}),
        )
    )


async def _on_bug(request: Request, error: Exception) -> Response:  # noqa: ARG001
    return refusal_response(Refusal(500, "The server made a mistake; its log has it.", code="internal"))
