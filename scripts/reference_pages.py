"""Pages of the documentation that are made of the code itself, when the site is built (a hook of mkdocs.yml).

    mkdocs build --strict

``reference/configuration.md`` comes from the pydantic classes in ``mlx_qlora.config``,
``reference/commands.md`` from the typer commands. Neither is kept in the repository: nothing can go stale.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from mlx_qlora.__main__ import COMMANDS, load_command
from mlx_qlora.config import Config, RunConfig, build_config
from mlx_qlora.presets import by_size, preset

SIZES = by_size()[::-1]  # the smallest Mac first


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to those found in ``docs/``."""
    for path, lines in (
        ("reference/configuration.md", configuration_page()),
        ("reference/commands.md", commands_page()),
    ):
        files.append(File.generated(config, path, content="\n".join(lines) + "\n"))
    return files


def configuration_page() -> Iterator[str]:
    """Every key of RunConfig: what it takes, its default, what the presets set, what it does."""
    yield "# Configuration\n"
    yield (
        "The same keys in a YAML file (`--config run.yaml`), on the command line (`--set lora.rank=16`)\n"
        "and in Python (`build_config({...})`). A key that does not exist is refused, and so is a value\n"
        "that does not fit; all problems are told at once. A complete file to begin with:\n\n"
        "```sh\nmlx-qlora presets --yaml mac-16gb > run.yaml\n```\n"
    )
    yield "## What the presets set\n"
    yield f"| key | {' | '.join(f'`{size}`' for size in SIZES)} |\n|---|{'---|' * len(SIZES)}"
    set_by_preset = _flat(preset(SIZES[0]))
    for key in set_by_preset:
        values = [_flat(preset(size))[key] for size in SIZES]
        yield f"| [`{key}`](#{_anchor(key)}) | {' | '.join(f'`{_as_yaml(value)}`' for value in values)} |"
    yield "\n`auto`, the default, is the largest of these that this Mac's memory and the model allow."
    for section, field in RunConfig.model_fields.items():
        part = field.annotation
        if isinstance(part, type) and issubclass(part, Config):
            yield f"\n## {section} {{ #{section} }}\n\n{_rewrapped(inspect.getdoc(part))}\n"
            yield from _keys(section, part)
        else:
            yield from _key(section, field.description, RunConfig.model_json_schema()["properties"][section])


def _keys(section: str, part: type[Config]) -> Iterator[str]:
    schema = part.model_json_schema()
    defaults = getattr(build_config({}), section).model_dump(mode="json")
    for name, field in part.model_fields.items():
        described = schema["properties"][name] | {"default": defaults[name]}
        yield from _key(f"{section}.{name}", field.description, described)


def _key(key: str, description: str | None, schema: dict[str, Any]) -> Iterator[str]:
    yield f"### `{key}` {{ #{_anchor(key)} }}\n"
    facts = [_takes(schema), f"default `{_as_yaml(schema.get('default'))}`"]
    by_preset = {size: _flat(preset(size)).get(key, schema.get("default")) for size in SIZES}
    if set(map(str, by_preset.values())) != {str(schema.get("default"))}:
        facts += [f"{size} `{_as_yaml(value)}`" for size, value in by_preset.items()]
    yield f"{' · '.join(facts)}\n\n{_rewrapped(description)}\n"


def _takes(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words: ``integer ≥ 1``, ``auto | bfloat16``, ``text or nothing``."""
    if "anyOf" in schema:
        kinds = [kind for kind in schema["anyOf"] if kind.get("type") != "null"]
        words = " or ".join(_takes(kind) for kind in kinds)
        return words + " or `null`" if len(kinds) < len(schema["anyOf"]) else words
    if "enum" in schema:
        return " | ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    names = {"string": "text", "boolean": "`true` | `false`", "array": "list", "object": "mapping"}
    words = names.get(schema.get("type", ""), schema.get("type", "value"))
    if words == "integer" and schema.get("exclusiveMinimum") == 0:
        return "integer ≥ 1"
    for name, sign in (
        ("minimum", "≥"),
        ("exclusiveMinimum", ">"),
        ("maximum", "≤"),
        ("exclusiveMaximum", "<"),
    ):
        words += f" {sign} {schema[name]:g}" if name in schema else ""
    return words


def commands_page() -> Iterator[str]:
    """Every sub-command: what it says of itself with --help, option by option."""
    yield "# Commands\n"
    yield (
        "`mlx-qlora COMMAND --help` says the same in the terminal. A mistake of the user's ends with exit\n"
        "code 2 and the next command to type, a run that was interrupted with 128 + the signal's number,\n"
        "a fault of ours with 1.\n"
    )
    yield "| command | what |\n|---|---|"
    for name, summary in COMMANDS.items():
        yield f"| [`{name}`](#{name}) | {summary} |"
    for name in COMMANDS:
        yield from _command(name)


def _command(name: str) -> Iterator[str]:
    command = load_command(name)
    yield f"\n## {name} {{ #{name} }}\n"
    yield from _said(command, name)
    for part in getattr(command, "commands", {}).values():  # of a group
        yield f"\n### {name} {part.name} {{ #{name}-{part.name} }}\n"
        yield from _said(part, f"{name} {part.name}")


def _said(command: Any, name: str) -> Iterator[str]:
    context = command.make_context(name, [], resilient_parsing=True)
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if paragraph.startswith("Example: "):
            yield f"```sh\n{_one_line(paragraph.removeprefix('Example: '))}\n```\n"
        else:
            yield f"{_escaped(_one_line(paragraph))}\n"
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is not None:
            usage, meaning = record
            yield f"`{usage}`\n:   {_escaped(_one_line(meaning))}\n"


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _anchor(key: str) -> str:
    return key.replace(".", "-")


def _as_yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _rewrapped(text: str | None) -> str:
    """A docstring as Markdown: reStructuredText's double backquotes made single, spare stars escaped."""
    return _escaped((text or "").replace("``", "`"))


def _escaped(text: str) -> str:
    """Stars, underscores, brackets and < as themselves outside of `code`."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*_<\[\]])", r"\\\1", part) for part in parts)
