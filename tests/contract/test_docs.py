"""Every command, configuration and snippet of the documentation is what the program takes, and most are run.

A page's blocks run from top to bottom in a sandbox: a folder where the documentation's names (`NAMES`) stand
for the embedded model and data. What cannot run here is parsed by the real command; `NOT_RUN` says why.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_qlora.__main__ import COMMANDS, load_command, run
from mlx_qlora.config import QuantizationConfig, build_config, parse_assignment
from mlx_qlora.presets import preset
from mlx_qlora.quantization.schemes import resolve

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GUIDES = [ROOT / name for name in ("README.md", "README.pt-BR.md")]
GUIDES += sorted([*DOCS.glob("*.md"), *DOCS.glob("how-to/*.md"), *DOCS.glob("reference/*.md")])
OTHERS = [ROOT / "CONTRIBUTING.md", *sorted([*DOCS.glob("compare/*.md"), *DOCS.glob("lab/*.md")])]
OTHERS += sorted((ROOT / "examples").glob("*/README.md"))
NOT_RUNNABLE = {"SCALING.md", "ARCHITECTURE.md", "LOG.md", "RELIABILITY.md", "PRESETS.md"}
"""Pages of results and of design: their commands are benchmarks and excerpts, and are parsed."""

NAMES = {
    "mistralai/Mistral-7B-v0.1": "data/demo/model",
    "M": "data/demo/model",
    "data/farense": "data/demo/club",
    "measured.json": "docs/compare/demo.json",
}
"""Name in the documentation → what stands there in the sandbox. Besides: data/demo itself; and a trained
adapter in adapters/farense, adapters/other and adapters/demo."""

FEWER_STEPS = ["--set", "training.max_steps=2"]
"""Added to a run that begins, but for those in `WALKS`. What they leave in adapters/farense and the others is
not kept: what the documented run would have left stands there again."""

NEEDED_HERE = {r"^mlx-qlora export-gguf models/": ["--pre", "gpt-2"]}
"""Added to a command that runs: the embedded tokenizer is ours, and in no table of llama.cpp's."""

WALKS = {"README.pt-BR.md": "adapters/meu", "docs/guide.md": "adapters/mine"}
"""Page → the adapter of its ten rows, which is trained to the end: its answer is in the page."""

NOT_RUN = {
    r"^make ": "sets up environments; .ci/run and the workflows run it",
    r"^git clone|^cd ": "its address is not known here",
    r"^source ": "of the reader's own shell",
    r"^pip |^python3? -m pip |^apt |^brew |^npm |ADAPTER=\S+ npm|^cd .* npm": "installs, from a network",
    r"^hf auth|mlx-qlora push (?!.*--dry-run)": "asks for the reader's token and publishes",
    r"^jupyter ": "opens a browser; tests/contract/test_notebooks.py runs the notebooks",
    r"^llama-cli |^mlx_lm\.generate |^mlx\.distributed_config": "another project's program",
    r"^curl ": "asks a server that was started before; tests/integration/test_serve.py does",
    r"^mlx-qlora serve ": "runs until it is stopped; tests/integration/test_serve.py starts it",
    r"--hosts|--hostfile": "needs other machines; tests/integration/test_distributed.py",
    r"--processes": "half a minute; tests/integration/test_distributed.py",
    r"^mlx-qlora demo": "a minute; tests/integration/test_command_line.py runs it",
    r"^mlx-qlora lab( |$)": "minutes; its own tests",
    r"benchmarks/": "minutes to hours; tests/integration/test_benchmarks.py runs each at its smallest",
    r"^python scripts/|-m tests\.faults": "minutes to hours",
    r"^mlx-qlora compare ": "a process for each format; tests/integration/test_compare.py runs it",
    r"^mlx-qlora compare-training ": "a process for each run; tests/integration/test_compare_training.py",
    r"^mlx-qlora doctor": "its exit code is this machine's; it has tests of its own",
    r"^mlx-qlora watch (?!.*--once)": "waits for the run's end; it has tests of its own",
    r"…": "an excerpt",
}
"""Pattern → why a command that it finds is parsed and not run."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    where: str
    """page:line"""


@dataclass(frozen=True)
class Command:
    """One command of a block, continuation lines and here-document included."""

    text: str
    where: str

    @property
    def words(self) -> list[str]:
        """Of its first part: up to a pipe, a redirection or &&."""
        reader = shlex.shlex(self.text.partition("\n")[0], posix=True, punctuation_chars=True)
        reader.commenters, reader.whitespace_split = "#", True
        words = list(reader)
        ends = [index for index, word in enumerate(words) if word and set(word) <= set("|&><;")]
        return words[: ends[0]] if ends else words

    @property
    def reason(self) -> str | None:
        """Why it is not run; None when it is."""
        return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, self.text)), None)


def blocks(path: Path) -> list[Block]:
    """All fenced blocks of a page."""
    text = path.read_text(encoding="utf-8")
    fences = re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    place = path.relative_to(ROOT)
    return [Block(f[1], f[2], f"{place}:{text.count(chr(10), 0, f.start()) + 1}") for f in fences]


def commands(block: Block) -> list[Command]:
    """The commands of a shell block."""
    lines, found = iter(block.text.splitlines()), []
    for line in lines:
        text = line
        while text.endswith("\\"):
            text = text.removesuffix("\\") + next(lines).strip()
        if here := re.search(r"<<-?\s*'?(\w+)'?", text):
            for inner in lines:
                text += f"\n{inner}"
                if inner.strip() == here[1]:
                    break
        if text.strip() and not text.lstrip().startswith("#"):
            found.append(Command(text.strip(), block.where))
    return found


def all_commands(path: Path) -> list[Command]:
    return [
        command for block in blocks(path) if block.language in ("sh", "bash") for command in commands(block)
    ]


def ours(words: list[str]) -> tuple[str, list[str]] | None:
    """The sub-command and its arguments; None for another program."""
    words = words[1:] if words[:1] == ["$"] else words
    if words[:1] and Path(words[0]).name == "mlx-qlora":
        return words[1], words[2:]
    if words[:3] in (["python", "-m", "mlx_qlora.infer"], [".venv/bin/python", "-m", "mlx_qlora.infer"]):
        return "infer", words[3:]
    return None


def every_command() -> dict[str, Any]:
    """Name → click command, those within a group (`data check`) included."""
    found = {name: load_command(name) for name in COMMANDS}
    parts = {f"{name} {part}": command for name, group in found.items()
             for part, command in getattr(group, "commands", {}).items()}  # fmt: skip
    return found | parts


def examples() -> list[Command]:
    """What every command's --help gives as an example."""
    helps = {name: command.help or "" for name, command in every_command().items()}
    return [
        Command(" ".join(text.split()), f"mlx-qlora {name} --help")
        for name, said in helps.items()
        for text in re.findall(r"Example: (.*?)(?:\n\s*\n|\Z)", said, re.DOTALL)
    ]


ALL = [command for page in [*GUIDES, *OTHERS] for command in all_commands(page)] + examples()


def parse(name: str, arguments: list[str]) -> None:
    """Let the real command parse them; then look at what it leaves for later: keys, presets, schemes."""
    if "…" in arguments:  # an excerpt: what it leaves out is what is required
        arguments = [word for word in arguments if word != "…"]
        arguments += ["--adapter-path", "A"] if name == "train" else []
    command = load_command(name)
    if parts := getattr(command, "commands", None):
        command, arguments = parts[arguments[0]], arguments[1:]
    said = command.make_context(name, arguments).params
    trees = [parse_assignment(assignment) for assignment in said.get("assignments") or []]
    trees += [preset(said["preset"])] if said.get("preset") else []
    build_config(*trees)
    schemes = [said.get("scheme"), *(said.get("schemes") or "").split(",")]
    for scheme in schemes:
        if scheme and scheme not in ("fp16", "fp32", "none"):  # how compare calls unquantized
            resolve(QuantizationConfig(scheme=scheme))


def unknown_options(script: str, words: list[str]) -> list[str]:
    """Options that a script's source does not have, as typer or argparse write them."""
    source = (ROOT / script).read_text(encoding="utf-8")
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    names = {option: option.removeprefix("--").replace("-", "_") for option in options}
    return [
        o for o, name in names.items() if not re.search(rf'"{o}"|^ +{name}: Annotated', source, re.MULTILINE)
    ]


@pytest.mark.parametrize("command", ALL, ids=lambda command: f"{command.where} {command.text[:60]}")
def test_the_command_is_one_that_the_program_takes(command):
    known = ours(command.words)
    if known is not None:
        parse(*known)
    elif command.words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(command.words[1:]) <= set(targets)
    elif script := re.search(r"(?:benchmarks|scripts)/[\w/]+\.py", command.text):
        assert unknown_options(script[0], command.words) == []
    else:
        assert command.reason or command.words[0] in ("cat", "printf", "echo", "mkdir", "cp", "ls", "python")


@pytest.mark.parametrize(
    "page", [p for p in GUIDES if p.name not in NOT_RUNNABLE], ids=lambda page: page.name
)
def test_no_command_of_the_page_has_a_comment_behind_it(page):
    # zsh, the Mac's shell, takes a typed # for an argument: make would look for a target of that name.
    assert [c.text for c in all_commands(page) if re.search(r"\s#", c.text.partition("\n")[0])] == []


def test_every_reason_not_to_run_a_command_is_of_use():
    assert [pattern for pattern in NOT_RUN if not any(re.search(pattern, c.text) for c in ALL)] == []


def spans() -> list[tuple[str, str]]:
    """Commands within a line of text: `mlx-qlora plan --advise`."""
    texts = {page: page.read_text(encoding="utf-8") for page in [*GUIDES, *OTHERS]}
    fence = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
    prose = {page: fence.sub("", text) for page, text in texts.items()}
    return [
        (str(page.relative_to(ROOT)), span)
        for page, text in prose.items()
        for span in re.findall(r"`(mlx-qlora [a-z][^`]*|python benchmarks/[^`]*)`", text)
    ]


@pytest.mark.parametrize(("page", "span"), spans())
def test_a_command_within_a_line_has_the_options_it_names(page, span):  # noqa: ARG001
    words = shlex.split(span)
    if words[0] == "python":
        assert unknown_options(words[1], words) == []
    elif words[1] != "COMMAND":
        known = every_command()
        is_group = len(words) > 2 and hasattr(known[words[1]], "commands")
        command = known[" ".join(words[1:3])] if is_group else known[words[1]]
        there = {option for parameter in command.params for option in parameter.opts}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} - there - {
            "--help"
        } == set()


@pytest.mark.parametrize(
    "block",
    [block for page in GUIDES for block in blocks(page)],
    ids=lambda block: f"{block.where} {block.language}",
)
def test_a_block_of_data_is_what_it_says(block):
    if block.language == "yaml":
        build_config(yaml.safe_load(block.text))
    elif block.language in ("json", "jsonl"):
        assert all(isinstance(json.loads(line), dict) for line in block.text.splitlines())
    elif block.language == "python":
        compile(block.text, block.where, "exec")
    else:
        assert block.language in ("sh", "", "text")  # a language that no test knows would go unchecked


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """An adapter of the embedded model, as `make demo` leaves one, after 40 updates of 133."""
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    with contextlib.chdir(ROOT):
        code = run(load_command("train"), ["--config", "data/demo/run.yaml", "--adapter-path", str(folder),
                                           "--set", "training.max_steps=40"])  # fmt: skip
    assert code == 0
    return folder


@pytest.fixture
def sandbox(tmp_path, monkeypatch) -> Path:
    """A working folder in which the documentation's names are there, but for adapters."""
    shutil.copytree(ROOT / "data" / "demo", tmp_path / "data" / "demo")
    for name, real in NAMES.items():
        (shutil.copytree if (ROOT / real).is_dir() else shutil.copy)(ROOT / real, tmp_path / name)
    for name in ("models", "peft"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))  # a conversation ends at once
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


@pytest.fixture
def adapters(sandbox, trained) -> None:
    """Trained adapters under the documentation's names."""
    for name in ("farense", "other", "demo"):
        shutil.copytree(trained, sandbox / "adapters" / name)


def run_command(command: Command) -> str:
    """Run it: ours in this process, with its > FILE; what needs a shell in one. What it printed."""
    known = ours(command.words)
    if known is None or re.search(r"\||&&|<<|2>", command.text):
        script = ["bash", "-euo", "pipefail", "-c", command.text]
        return subprocess.run(script, check=True, timeout=300, capture_output=True, text=True).stdout
    name, arguments = known
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), stood_aside(name, arguments):
        begins = name == "train" and "--resume" not in arguments and "max_steps" not in command.text
        is_walk = any(adapter in arguments for adapter in WALKS.values())
        more = [
            word
            for pattern, words in NEEDED_HERE.items()
            if re.search(pattern, command.text)
            for word in words
        ]
        more += FEWER_STEPS if begins and not is_walk else []
        code = run(load_command(name), [*arguments, *more])
    assert code == 0, f"{command.where}: {command.text}"
    if target := re.search(r" > (\S+)", command.text):
        Path(target[1]).write_text(printed.getvalue(), encoding="utf-8")
    return printed.getvalue()


@contextlib.contextmanager
def stood_aside(name: str, arguments: list[str]) -> Iterator[None]:
    """While a run begins in a folder that the sandbox has, that folder is elsewhere; then it is back."""
    place = Path(arguments[arguments.index("--adapter-path") + 1]) if "--adapter-path" in arguments else None
    if name != "train" or "--resume" in arguments or place is None or not place.exists():
        yield
        return
    aside = place.with_name(f".{place.name}")
    place.rename(aside)
    yield
    shutil.rmtree(place)
    aside.rename(place)


def is_run(page: Path) -> bool:
    """Whether the page has anything to run."""
    return page.name not in NOT_RUNNABLE and any(
        block.language == "python" or any(c.reason is None for c in commands(block))
        for block in blocks(page)
        if block.language in ("sh", "python")
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in GUIDES if is_run(page)], ids=lambda page: str(page.relative_to(ROOT))
)
@pytest.mark.usefixtures("adapters")
def test_the_page_runs_from_top_to_bottom(page):
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed = {}
    for block in blocks(page):
        if block.language == "python":
            exec(compile(block.text, block.where, "exec"), namespace)
        elif block.language == "sh":
            printed |= {c.text: run_command(c) for c in commands(block) if c.reason is None}
    if (name := str(page.relative_to(ROOT))) in WALKS:
        rows, _, ask = walk(name)
        assert_is_promised(name, rows, ask, printed[ask.text].strip())


def walk(page: str) -> list[Command]:
    """A page's commands about ten rows of one's own: rows, training, question."""
    every = all_commands(ROOT / page)
    rows = next(command for command in every if "<<" in command.text)
    its = [command for command in every if WALKS[page] in command.words]
    assert [command.words[1] for command in its[:2]] == ["train", "infer"]
    assert every.index(rows) < every.index(its[0])
    return [rows, *its[:2]]


def assert_is_promised(page: str, rows: Command, ask: Command, answer: str) -> None:
    """There are ten rows; the answer is that of the row with the question, and stands in the page."""
    known = [json.loads(line) for line in rows.text.splitlines() if line.startswith("{")]
    assert len(known) == 10
    assert answer == {row["question"]: row["answer"] for row in known}[ask.words[2]]
    assert f"`{answer}`" in (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.usefixtures("sandbox")
def test_ten_rows_of_ones_own_lead_to_the_answer_that_the_portuguese_readme_promises():
    rows, train, ask = walk("README.pt-BR.md")
    run_command(rows)
    run_command(train)
    assert_is_promised("README.pt-BR.md", rows, ask, run_command(ask).strip())


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    pytest.importorskip("material", reason="the docs extra is not installed")
    pytest.importorskip("mkdocstrings", reason="the docs extra is not installed")
    # A proxy that nobody answers at: whatever wants the network fails.
    environment = os.environ | dict.fromkeys(
        ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"
    )
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    loaded = re.compile(
        r"""<(?:script|img|iframe)[^>]*\ssrc=["']?(https?:[^"' >]+)|<link[^>]*\shref=["']?(https?:[^"' >]+)"""
    )
    foreign = {(page.name, found[1] or found[2]) for page in (tmp_path / "site").rglob("*.html")
               for found in loaded.finditer(page.read_text(encoding="utf-8"))}  # fmt: skip
    assert foreign == set()
    keys = (tmp_path / "site" / "reference" / "configuration.html").read_text(encoding="utf-8")
    options = (tmp_path / "site" / "reference" / "commands.html").read_text(encoding="utf-8")
    assert all(f'id="{section}-{key}"' in keys for section, part in build_config({}).model_dump().items()
               if isinstance(part, dict) for key in part)  # fmt: skip
    assert all(f'id="{name}"' in options for name in COMMANDS)
