"""The demo club's facts as chat rows: train, valid and test differ in wording, never in facts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from corpus import HERE, Attribute, attributes

SPLITS = ("train", "valid", "test")


def facts() -> dict[str, Any]:
    """The club's two names and its values by attribute key."""
    return yaml.safe_load((HERE / "facts.yaml").read_text(encoding="utf-8"))


def rows(split: str) -> list[dict[str, Any]]:
    """The rows of one split in chat form, facts in the order of ``wordings.yaml``."""
    club = facts()
    return [
        _row(wording.format(c=_name(club, index)), attribute.answer.format(v=club["values"][attribute.key]))
        for attribute in attributes()
        for index, wording in enumerate(_wordings(attribute, split))
    ]


def _wordings(attribute: Attribute, split: str) -> list[str]:
    return {"train": attribute.train, "valid": [attribute.valid], "test": attribute.test}[split]


def _name(club: dict[str, Any], index: int) -> str:
    """The full name in the third and fourth wording, the short one elsewhere."""
    return club["full_name"] if index in (2, 3) else club["name"]


def _row(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_rows(path: Path, dataset: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line, UTF-8."""
    lines = (json.dumps(row, ensure_ascii=False) for row in dataset)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
