"""The `mlx-qlora` command. Only the sub-command that runs is imported."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command_from_info
from typer.models import CommandInfo

from mlx_qlora.errors import Interrupted, MlxQloraError

COMMANDS = {
    "demo": "quantize, train and ask the embedded model: the whole job in a minute",
    "doctor": "look at this machine: what keeps a run from working, and the command that helps",
    "init": "write a run.yaml in which every key is explained; its schema, so that editors complete",
    "presets": "settings for Macs with 8, 16 and 32 GB",
    "data": "look through your rows, bring them into form, split them",
    "plan": "predicted peak memory of a run, from config.json alone",
    "quantize": "turn a 16-bit checkpoint into a quantized one, tensor by tensor",
    "compare": "storage formats side by side: size, memory, speed, and what becomes of the answers",
    "train": "train an adapter on your data; stops and resumes at any moment",
    "compare-training": "LoRA beside QLoRA in each scheme: size, memory, time, quality, all measured",
    "watch": "look at a run from another terminal: progress, loss, memory, time left",
    "infer": "ask one question",
    "chat": "talk with a model in the terminal",
    "serve": "an OpenAI-compatible server for a base and any number of adapters",
    "evaluate": "loss, perplexity and exact match of a base model and its adapter",
    "fuse": "make one model of a base and its adapter; says first what it loses",
    "import-gguf": "make a model folder of a GGUF file; it trains like any other",
    "export-gguf": "write a model, or an adapter, for llama.cpp",
    "import-peft": "make an adapter for MLX of a PEFT adapter",
    "export-peft": "make a PEFT adapter of an adapter",
    "export-bitsandbytes": "write an NF4 model as transformers and bitsandbytes read it",
    "push": "publish an adapter or a model on the hub, with a card written from its run",
    "lab": "the theory of quantization, measured: tables and figures",
}


class LazyGroup(TyperGroup):
    """Finds a sub-command in the module of its name, when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        """Names in the order of a user's day."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        """The sub-command, imported now; None when there is none of that name."""
        return load_command(cmd_name) if cmd_name in COMMANDS else None

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """The list in --help, without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:  # noqa: ARG002
        """Names for the shell, each with what it does, without importing any of them."""
        named: dict[str, Any] = {name: TyperCommand(name, short_help=text) for name, text in COMMANDS.items()}
        listed = TyperGroup(name=self.name, params=self.params, commands=named)
        return listed.shell_complete(typer.Context(listed), incomplete)


def load_command(name: str) -> Any:
    """The click command `name`, from the function of that name in ``mlx_qlora.commands.<name>``."""
    function = getattr(import_module(f"mlx_qlora.commands.{name.replace('-', '_')}"), name.replace("-", "_"))
    if isinstance(function, typer.Typer):  # a group of commands
        group = typer.main.get_group(function)
        group.name = name
        return group
    info = CommandInfo(name=name, callback=function)
    return get_command_from_info(info, pretty_exceptions_short=True, rich_markup_mode=None)


app = typer.Typer(
    cls=LazyGroup,
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=True,
    help="QLoRA on a Mac: quantize, train and use adapters in the memory you have.",
    epilog="Begin with: mlx-qlora demo",
)


@app.callback()
def root() -> None:
    """Options that all commands share would stand here."""


def run(command: Any, arguments: list[str] | None = None) -> int:
    """Run a command: 0, or 2 for the user's mistakes, 1 for ours, 128 + n for signal n."""
    try:
        command.main(args=arguments)
    except MlxQloraError as error:
        prefix = "" if isinstance(error, Interrupted) else "error: "
        print(f"{prefix}{error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as done:  # how typer ends, usage errors (2) included
        return done.code if isinstance(done.code, int) else int(bool(done.code))
    return 0


def main() -> None:
    """Entry point of ``mlx-qlora``."""
    sys.exit(run(typer.main.get_command(app)))


if __name__ == "__main__":
    main()
