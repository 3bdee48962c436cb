"""A conversation as people have it: at a terminal, through a pipe, and as one JSON object."""

import codecs
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest

from tests.checkpoints import make_checkpoint
from tests.conftest import REPOSITORY

MODEL = REPOSITORY / "data" / "demo" / "model"
CODE = (
    "from mlx_qlora.__main__ import load_command, run; import sys; "
    "sys.exit(run(load_command('chat'), sys.argv[1:]))"
)
COMMAND = [sys.executable, "-c", CODE, "--model", str(MODEL), "--scheme", "int4"]


class Terminal:
    """The command at a terminal of its own."""

    def __init__(self, cwd, *, columns: int = 80, options=()):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            os.environ["TERM"] = "dumb"
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run in the background ignores it
            os.execv(sys.executable, [*COMMAND, *options])
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.shown, self.pending, self.raw = "", "", b""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def until(self, text: str, seconds: float = 60) -> str:
        """What is shown up to and with `text`; what comes after it is kept for the next look."""
        end = time.monotonic() + seconds
        while text not in self.pending and time.monotonic() < end:
            if not select.select([self.fd], [], [], 0.2)[0]:
                continue
            try:
                read = os.read(self.fd, 4096)
            except OSError:  # the terminal is closed: the command has ended
                break
            self.raw += read
            self.pending += self.decoder.decode(read).replace("\r\n", "\n")
        seen, found, self.pending = self.pending.partition(text)
        self.shown += seen + found
        assert found, self.shown
        return seen + found

    def type(self, text: str, until: str = "> ", seconds: float = 60) -> str:
        """Type a line, and see what comes of it."""
        os.write(self.fd, text.encode() + b"\r")
        self.until("\n")  # the terminal's echo
        return self.until(until, seconds)

    def press(self, key: bytes) -> None:
        """Press Ctrl-C (3) or Ctrl-D (4), as late after a prompt as a person does.

        Python's readline looks for a signal only once it waits for a key: one that comes between the
        prompt's last character and that is seen at the next key.
        """
        time.sleep(0.5)
        os.write(self.fd, key)

    def status(self) -> int:
        """The exit code."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture(scope="module")
def endless_model(tiny_llama_folder, tmp_path_factory):
    """A model of random weights, which does not end its answers for a long while."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    return make_checkpoint(folder, "llama-untied", tiny_llama_folder, max_position_embeddings=100_000)


@pytest.fixture
def terminal(tmp_path):
    made = []

    def start(**settings):
        made.append(Terminal(tmp_path, **settings))
        made[-1].until("> ")
        return made[-1]

    yield start
    for each in made:
        end(each)


def end(terminal: Terminal) -> None:
    try:
        os.kill(terminal.pid, signal.SIGKILL)
        os.waitpid(terminal.pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
    os.close(terminal.fd)


def piped(*options, lines: str, cwd):
    return subprocess.run(
        [*COMMAND, *options], input=lines, capture_output=True, text=True, cwd=cwd, timeout=120
    )


def test_a_conversation_at_a_terminal(terminal, tmp_path):
    talk = terminal()
    assert "/help lists the commands" in talk.shown
    answer = talk.type("Quem fundou o clube?")
    assert re.search(r"^O \w+.*\.\n\n> $", answer)
    assert "Traceback" not in answer
    assert talk.type("/help").count("/save") >= 2
    assert "there is no command /foo" in talk.type("/foo").lower()
    continued = talk.type("E o \\", until="… ")
    assert continued == "… "
    talk.type("estádio?")
    assert "(2 turns saved in talk.jsonl)" in talk.type("/save talk.jsonl")
    assert "there already" in talk.type("/save talk.jsonl")
    row = json.loads((tmp_path / "talk.jsonl").read_text())
    assert row["messages"][2]["content"] == "E o \nestádio?"
    talk.press(b"\x03")
    talk.until("Ctrl-C again")
    talk.until("> ")
    assert "(system prompt: Curto.)" in talk.type("/system Curto.")
    assert "(forgotten)" in talk.type("/reset")
    talk.press(b"\x04")
    assert talk.status() == 0
    assert max(map(len, talk.shown.splitlines())) <= 80


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_twice_at_the_prompt_the_program(terminal, endless_model):
    talk = terminal(options=("--model", str(endless_model), "--scheme", "none", "--max-tokens", "90000"))
    for _ in range(2):
        os.write(talk.fd, b"Quem fundou o clube?\r")
        talk.until("?\n")
        talk.until("\n")
        talk.press(b"\x03")
        talk.until("(stopped)")
        talk.until("> ")
    talk.press(b"\x03")
    talk.until("Ctrl-C again")
    talk.until("> ")
    talk.press(b"\x03")
    assert talk.status() == 0
    assert "Traceback" not in talk.shown


@pytest.mark.slow
def test_no_word_is_broken_at_a_narrow_terminal(terminal):
    narrow = terminal(columns=16, options=("--max-tokens", "30"))
    shown = narrow.type("Quem fundou o clube?").removesuffix("\n\n> ")
    assert re.fullmatch(r"O fundador foi\n\S+ \S+\.", shown)
    assert max(map(len, shown.splitlines())) <= 16
    assert b"\x1b" not in narrow.raw


@pytest.mark.slow
def test_lines_of_a_pipe_are_questions_and_only_answers_go_to_stdout(tmp_path):
    lines = "Quem fundou o clube?\n\n/save a b.jsonl\n/reset\nQuem fundou \\\no clube?\n"
    done = piped(lines=lines, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    assert len(answers) == 2
    assert all(answers)
    assert "\x1b" not in done.stdout + done.stderr
    assert ">" not in done.stdout
    saved = json.loads((tmp_path / "a b.jsonl").read_text())
    assert saved["messages"][1] == {"role": "assistant", "content": answers[0]}


def test_json_is_one_object_with_the_whole_conversation_and_bad_lines_exit_with_two(tmp_path):
    lines = "Quem fundou o clube?\n/nonsense\n/adapter nowhere\nE o estádio?\n/exit\nnot asked\n"
    done = piped("--json", "--system", "Curto.", lines=lines, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "2 of the lines" in done.stderr
    talk = json.loads(done.stdout)
    assert [m["role"] for m in talk["messages"]] == ["user", "assistant"] * 2
    assert talk["messages"][2]["content"] == "E o estádio?"
    assert talk["system"] == "Curto."
    assert len(talk["answers"]) == 2
    assert talk["answers"][1]["cached_tokens"] > 0
    assert talk["answers"][0].keys() >= {"prompt_tokens", "generation_tokens", "finish_reason"}


@pytest.mark.parametrize(
    ("options", "said"),
    [(("--context", "3"), "no conversation"), (("--adapter-path", "no"), "no adapter")],
)
def test_a_mistake_is_one_clear_error(options, said, tmp_path):
    done = piped(*options, lines="olá\n", cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
