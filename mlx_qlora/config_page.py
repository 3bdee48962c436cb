"""The configuration for people and editors: a commented run.yaml, and its JSON schema.

Both are made of the classes in `mlx_qlora.config`: the words are their docstrings, the limits their types.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from copy import deepcopy
from functools import cache
from typing import Any

import yaml

from mlx_qlora.config import RunConfig

SCHEMA_NAME = "mlx-qlora.schema.json"
"""What the schema is called where it lies beside a run.yaml."""

SCHEMA_TITLE = "A run of mlx-qlora: run.yaml"

_WIDTH = 100
_OPENING = """\
{origin}Train with it: mlx-qlora train --config {name} --adapter-path adapters/NAME
These are all the keys there are. One that is deleted has its default."""


def commented_yaml(
    config: RunConfig, *, schema: str | None = SCHEMA_NAME, name: str = "run.yaml", preset: str = ""
) -> str:
    """`config` as YAML, each key below what it means; read back, it is the same configuration.

    Where a value is not the default, the comment says what that would be.

    Args:
        schema: Where editors find the JSON schema, relative to the file; None leaves that line out.
        name: The file's own name, for the command in its first lines.
        preset: Where the settings are from.
    """
    tree, defaults = config.model_dump(mode="json"), RunConfig().model_dump(mode="json")
    words = _schema()["$defs"]
    lines = [f"# yaml-language-server: $schema={schema}"] if schema is not None else []
    origin = f"The settings are those of the preset {preset}.\n" if preset else ""
    lines += [f"# {line}" for line in _OPENING.format(origin=origin, name=shlex.quote(name)).split("\n")]
    for section in RunConfig.model_fields:
        described = words[type(getattr(config, section)).__name__]
        lines += ["", *_comment(described["description"], ""), f"{section}:"]
        for key, value in tree[section].items():
            text = _key_comment(described["properties"][key], value, defaults[section][key])
            lines += [*_comment(text, "  "), *_entry(key, value), ""]
        lines.pop()
    return "\n".join(lines) + "\n"


def run_schema() -> dict[str, Any]:
    """The JSON schema of a run.yaml, with every key's meaning, limits and default.

    It is a little stricter than what is accepted: numbers in quotes are refused. Which values exclude each
    other is left to `build_config`.
    """
    return deepcopy(_schema())


@cache
def _schema() -> dict[str, Any]:
    schema = _in_yaml_words(RunConfig.model_json_schema())
    written = RunConfig.model_json_schema(mode="serialization")
    for section, described in schema["$defs"].items():
        for key, value in described["properties"].items():
            # Pairs in Python, a mapping in YAML, where a scheme may be null.
            if written["$defs"][section]["properties"][key].get("type") == "object" != value.get("type"):
                of = {"anyOf": [{"type": "string"}, {"type": "null"}]}
                kept = {name: value[name] for name in ("description", "title") if name in value}
                described["properties"][key] = {
                    **kept,
                    "type": "object",
                    "additionalProperties": of,
                    "default": {},
                }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": SCHEMA_TITLE}


def _in_yaml_words(schema: Any) -> Any:
    """With null for None in all that is described."""
    if isinstance(schema, list):
        return [_in_yaml_words(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    said = {key: _in_yaml_words(value) for key, value in schema.items()}
    if isinstance(said.get("description"), str):
        said["description"] = re.sub(r"\bNone\b", "null", said["description"])
    return said


def _key_comment(described: dict[str, Any], value: Any, default: Any) -> str:
    text = str(described.get("description", ""))
    choices = described.get("enum") or described.get("items", {}).get("enum")
    if choices:
        text += f"\nOne of: {', '.join(map(str, choices))}."
    if value != default:
        text += f"\nDefault: {_inline(default)}"
    return text


def _comment(text: str, indent: str) -> list[str]:
    """A comment of whole paragraphs: docstrings are wrapped for Python's margins, not for these."""
    lines = list[str]()
    for paragraph in re.split(r"\n\s*\n|\n(?=One of: |Default: )", text):
        lines += textwrap.wrap(
            " ".join(paragraph.split()),
            _WIDTH - len(indent) - 2,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return [f"{indent}# {line}" for line in lines]


def _entry(key: str, value: Any) -> list[str]:
    flow = f"{key}: {_inline(value)}"
    if isinstance(value, list | dict) and len(flow) <= _WIDTH:
        return [f"  {flow}"]
    return [f"  {line}" if line else "" for line in _dumped({key: value}).removesuffix("\n").split("\n")]


def _inline(value: Any) -> str:
    return _dumped(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


def _dumped(value: Any, **style: Any) -> str:
    # A next-line character outside of quotes would be read back as a line break.
    is_plain = "\x85" not in _text_in(value)
    settings = {"default_flow_style": False, "width": _WIDTH - 2, **style}
    return str(yaml.safe_dump(value, allow_unicode=is_plain, sort_keys=False, **settings))


def _text_in(value: Any) -> str:
    if isinstance(value, dict):
        return "".join(map(_text_in, [*value.keys(), *value.values()]))
    return "".join(map(_text_in, value)) if isinstance(value, list) else str(value)
