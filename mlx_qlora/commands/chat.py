"""``mlx-qlora chat``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_qlora.commands.infer import newest_adapter
from mlx_qlora.commands.options import Offload, OffloadBudget, stored_as
from mlx_qlora.commands.output import Json, on_bytes, print_json, say
from mlx_qlora.commands.terminal import AnswerWriter, piped_lines, stop_on_ctrl_c, typed_lines
from mlx_qlora.errors import ConfigError, Interrupted, MlxQloraError

if TYPE_CHECKING:
    from mlx_qlora.inference.chat import Chat, Reply

HELP = """\
/reset                forget the conversation
/system TEXT          another system prompt; alone, show it; /system none: none
/adapter NAME|PATH    another adapter on the same base; alone, list them;
                      /adapter none: the bare base model
/save FILE            the conversation as a row of training data (JSONL);
                      /save --append FILE adds a row to a file
/exit                 end (Ctrl-D too)

A backslash at the end of a line goes on with the next one. A line that begins
with // is sent with one slash. Ctrl-C stops an answer."""


def chat(
    model: Annotated[str | None, typer.Option(help="Base model; the adapter's own when not given.")] = None,
    adapter_path: Annotated[
        Path | None,
        typer.Option(help="Folder of the adapter; the newest in adapters/ when nothing is given."),
    ] = None,
    scheme: Annotated[str | None, typer.Option(help="How to store the base: int4, int8, …, none.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt; the adapter's own if none.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample among the likeliest tokens of this total probability.")
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens the conversation may take; the model's limit if none.")
    ] = None,
    offload: Offload = False,
    offload_budget_gib: OffloadBudget = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Allow the model folder's own code.")] = False,
    as_json: Json = False,
) -> None:
    """Talk with a model in the terminal; lines piped in are questions too.

    Example: mlx-qlora chat --adapter-path adapters/farense

    /help lists the commands: /reset, /system, /adapter, /save, /exit. Ctrl-C stops an answer, Ctrl-D ends.
    With --json one object with the whole conversation is printed at the end.
    """
    from mlx_qlora.inference.chat import Chat, check_context
    from mlx_qlora.inference.generate import Sampling, load_assistant
    from mlx_qlora.lora.adapter import read_adapter_info
    from mlx_qlora.weights.source import resolve_adapter

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    check_context(context)
    if model is None and adapter_path is None:
        adapter_path = newest_adapter(Path("adapters"))
    folder = resolve_adapter(adapter_path) if adapter_path is not None else None
    info = read_adapter_info(folder) if folder is not None else None
    stored = stored_as(scheme, has_adapter=info is not None)
    assistant = load_assistant(
        model if model is not None else info.model.path if info else None,
        quantization=stored or (info.quantization if info else None),
        dtype=info.model.dtype if info and model is None else None,
        revision=revision
        if revision is not None or model is not None or info is None
        else info.model.revision,
        trust_remote_code=trust_remote_code,
        offload=offload,
        offload_budget_gib=offload_budget_gib,
        on_bytes=on_bytes("Quantizing"),
    )
    for note in assistant.base.notes:
        say(note)
    talk = Chat(assistant, sampling=sampling, context=context)
    talk.system = system
    if folder is not None:
        talk.switch_adapter(folder)
    session = Session(talk, adapter_path, as_json=as_json)
    try:
        session.run()
    finally:
        if as_json:
            print_json(session.as_dict())
    if session.failed:
        raise ConfigError(f"{session.failed} of the lines could not be carried out; see above.")


class Session:
    """Lines in, answers out, until the lines end.

    Args:
        talk: The conversation.
        adapter_path: Of the adapter that is attached.
        as_json: Leave stdout to the object at the end; answers go to stderr, and only to a terminal.
    """

    def __init__(self, talk: Chat, adapter_path: Path | None, *, as_json: bool) -> None:
        self.talk, self.adapter_path = talk, adapter_path
        self.is_interactive = sys.stdin.isatty()
        self.failed = 0
        """Lines of a pipe that were refused."""
        self._out = sys.stderr if as_json else sys.stdout
        self._is_silent = as_json and not self.is_interactive
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _rest: self._say(HELP),
            "/reset": self._reset,
            "/system": self._system,
            "/adapter": self._adapter,
            "/save": self._save,
        }

    def run(self) -> None:
        """Take each line: a command, or a question to answer.

        Raises:
            Interrupted: Ctrl-C while lines come from a pipe.
        """
        if self.is_interactive:
            self._greet()
        try:
            for line in typed_lines() if self.is_interactive else piped_lines(sys.stdin):
                if line.strip() in ("/exit", "/quit"):
                    return
                self._take(line)
        except BrokenPipeError:  # whoever read the answers has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def as_dict(self) -> dict[str, Any]:
        """The whole conversation, and what each answer took."""
        replies = [
            {
                **asdict(reply.answer),
                "cached_tokens": reply.cached_tokens,
                "dropped_pairs": reply.dropped_pairs,
            }
            for reply in self.talk.replies
        ]
        return {
            "model": self.talk.assistant.base.source.name,
            "adapter_path": self.adapter_path,
            "system": self.talk.system_prompt,
            "messages": self.talk.messages,
            "answers": [{key: value for key, value in each.items() if key != "text"} for each in replies],
        }

    def _take(self, line: str) -> None:
        try:
            if line.startswith("/") and not line.startswith("//"):
                self._command(line)
            elif line.strip():
                self._answer(line.removeprefix("/") if line.startswith("//") else line)
        except MlxQloraError as error:
            if isinstance(error, Interrupted):
                raise
            say(f"error: {error}")
            self.failed += not self.is_interactive
        except KeyboardInterrupt:
            if not self.is_interactive:
                raise Interrupted("stopped", signal_number=signal.SIGINT) from None
            say("\n(stopped)")

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name not in self._commands:
            raise ConfigError(
                f"There is no command {name}; /help lists them.",
                run=f"/{line}   # sends it as it is, with one slash" if self.is_interactive else None,
            )
        self._commands[name](rest.strip())

    def _answer(self, question: str) -> None:
        writer, reply = AnswerWriter(self._out, is_silent=self._is_silent), None
        with stop_on_ctrl_c() as is_stopped:
            for piece, so_far in self.talk.ask(question, should_stop=is_stopped):
                if reply is None and so_far.dropped_pairs:
                    self._say(f"(the context is full: {_dropped(so_far.dropped_pairs)})")
                reply = so_far
                writer.write(piece)
            stopped = is_stopped()
        writer.end()
        if stopped and not self.is_interactive:
            raise Interrupted("stopped", signal_number=signal.SIGINT)
        self._after(reply, stopped=stopped)

    def _after(self, reply: Reply | None, *, stopped: bool) -> None:
        if stopped:
            self._say("(stopped)")
        elif reply is None or not reply.answer.text.strip():
            self._say("(the model answered nothing; the turn is not kept)")
        elif reply.answer.finish_reason == "length":
            self._say(f"(cut after {reply.answer.generation_tokens} tokens; --max-tokens allows more)")
        if self.is_interactive:
            self._say("")

    def _reset(self, _rest: str) -> None:
        self.talk.reset()
        self._say("(forgotten)")

    def _system(self, text: str) -> None:
        if text:
            self.talk.system = "" if text == "none" else text
        shown = self.talk.system_prompt
        self._say(f"(system prompt: {shown})" if shown else "(no system prompt)")

    def _adapter(self, name: str) -> None:
        if not name:
            there = [path.parent.name for path in sorted(Path("adapters").glob("*/adapters.safetensors"))]
            self._say(
                f"(attached: {self.adapter_path or 'none'}; in adapters/: {', '.join(there) or 'none'})"
            )
            return
        from mlx_qlora.weights.source import resolve_adapter

        chosen = None if name == "none" else _adapter_folder(name)
        self.talk.switch_adapter(resolve_adapter(chosen) if chosen else None)
        self.adapter_path = chosen
        self._say(f"(adapter: {chosen})" if chosen else "(the bare base model)")

    def _save(self, rest: str) -> None:
        append, name = rest.startswith("--append "), rest.removeprefix("--append ").strip()
        if not name:
            raise ConfigError("The file's name is missing.", run="/save FILE.jsonl")
        path = Path(name).expanduser()
        self.talk.save(path, append=append)
        cut = sum(reply.answer.finish_reason != "stop" for reply in self.talk.replies)
        note = f"; {cut} of the answers {'was' if cut == 1 else 'were'} cut short" if cut else ""
        self._say(f"({len(self.talk.replies)} turns saved in {path}{note})")

    def _greet(self) -> None:
        base = self.talk.assistant.base.source.name
        named = Path(base).name if Path(base).is_absolute() else base
        adapter = f" with {self.adapter_path}" if self.adapter_path else ""
        self._say(f"{named}{adapter}. /help lists the commands; Ctrl-D ends.\n")

    def _say(self, text: str) -> None:
        if not self._is_silent:
            say(text)


def _adapter_folder(name: str) -> Path:
    """The folder of that name in adapters/, or else the path."""
    near = Path("adapters") / name
    return near if (near / "adapters.safetensors").is_file() else Path(name).expanduser()


def _dropped(count: int) -> str:
    return f"the oldest {'turn is' if count == 1 else f'{count} turns are'} left out"
