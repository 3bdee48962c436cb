"""The server's own description, for programs and for tests that try to break it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mlx_qlora.serving.limits import Limits
from mlx_qlora.serving.schema import ChatRequest, CompletionRequest

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
                "limit": {
                    "type": "object",
                    "required": ["name", "value"],
                    "properties": {"name": {"type": "string"}, "value": {"type": "number"}},
                },
            },
        }
    },
}
_USAGE = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "properties": {
        name: {"type": "integer", "minimum": 0}
        for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    },
}
_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {"role": {"const": "assistant"}, "content": {"type": "string"}},
}
_MODEL = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {"id": {"type": "string"}, "object": {"const": "model"}, "created": {"type": "integer"}},
}


def describe(names: Iterable[str], limits: Limits, *, needs_key: bool) -> dict[str, Any]:
    """OpenAPI 3.1 of what is served, with the names there are and the limits."""
    schemas: dict[str, Any] = {"Error": _ERROR, "Usage": _USAGE, "Model": _MODEL}
    for kind in (ChatRequest, CompletionRequest):
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schema["properties"]["model"]["enum"] = list(names)
        schemas[kind.__name__] = schema
    schemas["ChatCompletion"] = _answer("chat.completion", "message", _MESSAGE)
    schemas["TextCompletion"] = _answer("text_completion", "text", {"type": "string"})
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "mlx-qlora", "version": "1", "description": _limits_in_words(limits)},
        "paths": {
            "/v1/chat/completions": {"post": _generation("ChatRequest", "ChatCompletion")},
            "/v1/completions": {"post": _generation("CompletionRequest", "TextCompletion")},
            "/v1/models": {"get": {"responses": {"200": _listing(), **_errors(401)}}},
            "/v1/models/{name}": {"get": _one_model()},
            "/health": {"get": {"security": [], "responses": {
                "200": {"description": "ready"}, "503": {"description": "stopping"}}}},
            "/metrics": {"get": {"responses": {"200": {
                "description": "Prometheus' text form", "content": {"text/plain": {}}}, **_errors(401)}}},
        },
        "components": {"schemas": schemas},
    }  # fmt: skip
    if needs_key:
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"key": []}]
    return described


def _limits_in_words(limits: Limits) -> str:
    fields = ", ".join(f"{name} = {value:g}" for name, value in vars(limits).items())
    return f"OpenAI-compatible server of a base model and its adapters. Limits: {fields}."


def _generation(request: str, answer: str) -> dict[str, Any]:
    return {
        "requestBody": {"required": True, "content": _content(request)},
        "responses": {
            "200": {
                "description": "The answer; server-sent events with stream: true.",
                "content": {**_content(answer), "text/event-stream": {}},
            },
            **_errors(400, 401, 404, 408, 413, 415, 422, 429, 503),
        },
    }


def _answer(kind: str, field: str, schema: dict[str, Any]) -> dict[str, Any]:
    choice = {
        "type": "object",
        "required": ["index", field, "logprobs", "finish_reason"],
        "properties": {
            "index": {"type": "integer"},
            field: schema,
            "finish_reason": {"enum": ["stop", "length"]},
        },
    }
    return {
        "type": "object",
        "required": ["id", "object", "created", "model", "choices", "usage"],
        "properties": {
            "id": {"type": "string"},
            "object": {"const": kind},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "choices": {"type": "array", "minItems": 1, "items": choice},
            "usage": {"$ref": "#/components/schemas/Usage"},
        },
    }


def _one_model() -> dict[str, Any]:
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    found = {"description": "It is served.", "content": _content("Model")}
    return {"parameters": [name], "responses": {"200": found, **_errors(401, 404)}}


def _listing() -> dict[str, Any]:
    items = {"type": "array", "items": {"$ref": "#/components/schemas/Model"}}
    schema = {"type": "object", "required": ["object", "data"], "properties": {"data": items}}
    return {"description": "What is served.", "content": {"application/json": {"schema": schema}}}


def _content(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _errors(*statuses: int) -> dict[str, Any]:
    return {
        str(status): {"description": "OpenAI's error form", "content": _content("Error")}
        for status in statuses
    }
