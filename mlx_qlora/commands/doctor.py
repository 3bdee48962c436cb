"""``mlx-qlora doctor``."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_qlora.commands.output import Json, gigabytes, print_json
from mlx_qlora.errors import MlxQloraError

if TYPE_CHECKING:
    from rich.console import Console

    from mlx_qlora.machine.finding import Finding

# Okabe and Ito's green, orange and vermilion; the mark and the word say the same without them.
STYLES = {"ok": ("✓", "#009E73"), "warning": ("!", "#E69F00"), "problem": ("✗", "bold #D55E00")}

TEXT_COLUMN, COMMAND_COLUMN = 28, 11


def doctor(
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder of a base model: can it be trained here?")
    ] = None,
    as_json: Json = False,
) -> None:
    """Look at this machine: what keeps a run from working or makes it slow, and the command that helps.

    Example: mlx-qlora doctor --model mistralai/Mistral-7B-v0.1

    Nothing is changed. The hub is asked one question, unless HF_HUB_OFFLINE is set. The exit code is 1 when
    something prevents work, and 0 otherwise.
    """
    from mlx_qlora.machine.checkup import examine
    from mlx_qlora.machine.finding import gathered, has_problem

    findings = examine()
    if model is not None:
        findings += gathered([("model", lambda: model_findings(model))])
    if as_json:
        print_json({"ok": not has_problem(findings), "findings": [asdict(finding) for finding in findings]})
    else:
        from rich.console import Console

        show(findings, Console(highlight=False, markup=False), model)
    if has_problem(findings):
        raise typer.Exit(1)


def model_findings(model: str) -> Iterator[Finding]:
    """Whether a model is there or can be fetched, whether there is room for it, and whether a run fits."""
    from mlx_qlora.config import build_config
    from mlx_qlora.machine.finding import Finding
    from mlx_qlora.machine.hub import download
    from mlx_qlora.presets import preset as preset_tree
    from mlx_qlora.training.planning import auto_preset, plan_run

    yield from download(model)
    try:
        preset = auto_preset(model)
        planned = plan_run(build_config(preset_tree(preset), {"model": {"path": model}}, where="--model"))
    except MlxQloraError as error:
        what = " ".join(error.what.split())
        yield Finding("model", "problem", f"{model}: {what}", error.run or "mlx-qlora doctor --help")
        return
    plan = planned.plan
    need, may = gigabytes(plan.needed_bytes), gigabytes(plan.budget.num_bytes)
    facts = {"preset": preset, "needed_bytes": plan.needed_bytes, "budget_bytes": plan.budget.num_bytes}
    if plan.fits:
        text = f"{model}: training takes {need} of {may} with {preset} and full rows"
        run = f"mlx-qlora train --model {model} --data D --preset {preset} --adapter-path A"
        yield Finding("model", "ok", text, run, facts)
    else:
        text = f"{model}: training would take {need}, and {may} may be used"
        yield Finding("model", "problem", text, f"mlx-qlora plan --model {model} --advise", facts)


def show(findings: list[Finding], console: Console, model: str | None = None) -> None:
    """A line for each finding and its command below it; plain sentences off a terminal.

    Commands are never broken by us, so that they can be copied.
    """
    for finding in findings:
        if console.is_terminal:
            _show_in_columns(finding, console)
        else:
            console.print(f"{finding.status}: {finding.subject}: {finding.text}", soft_wrap=True)
            if finding.run:
                console.print(f"    {_label(finding)} {finding.run}", soft_wrap=True)
    counts = Counter(finding.status for finding in findings)
    console.print()
    if counts["problem"]:
        console.print(f"{_counted(counts['problem'], 'problem')} to solve first; the commands stand above.")
    elif counts["warning"]:
        console.print(f"Nothing prevents work. {_counted(counts['warning'], 'warning')}.")
    else:
        console.print("Everything is as it should be.")
    if not counts["problem"] and model is None:
        console.print("Next: mlx-qlora doctor --model M, or mlx-qlora demo", soft_wrap=True)


def _show_in_columns(finding: Finding, console: Console) -> None:
    from rich.text import Text

    mark, style = STYLES[finding.status]
    mark = mark if _can_write(mark, console.encoding) else "-"
    head: list[str | tuple[str, str]] = [(f"{mark} {finding.status:<8} ", style), f"{finding.subject:<16} "]
    first, *rest = _wrapped(finding.text, console.width - TEXT_COLUMN)
    console.print(Text.assemble(*head, first), soft_wrap=True)
    for line in rest:
        console.print(" " * TEXT_COLUMN + line, soft_wrap=True)
    if finding.run:
        command, _, remark = finding.run.partition("   # ")
        label = f"{_label(finding)} "
        console.print(Text.assemble(" " * COMMAND_COLUMN, label, (command, "bold")), soft_wrap=True)
        for line in _wrapped(remark, console.width - COMMAND_COLUMN - len(label)) if remark else []:
            console.print(" " * (COMMAND_COLUMN + len(label)) + line, soft_wrap=True)


def _label(finding: Finding) -> str:
    return "Tip:" if finding.status == "ok" else "Run:"


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(24, width), break_long_words=False, break_on_hyphens=False) or [""]


def _can_write(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
