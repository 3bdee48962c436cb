"""Rewrite the tested set from the environment this runs in, names and versions only: constraints.txt, and the
part of it that `mlx-qlora doctor` compares with.

Run it in a fresh environment that holds the project with its dev extra:
    .venv/bin/python scripts/update_constraints.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

from mlx_qlora.machine import software

ROOT = Path(__file__).parents[1]
# Needed on macOS by ipykernel, so never installed where this usually runs.
ELSEWHERE = {"appnope": "0.1.4; sys_platform == 'darwin'"}
# One of the two is installed with mlx, by platform; they share its version.
BACKENDS = {"mlx-cpu": "sys_platform == 'linux'", "mlx-metal": "sys_platform == 'darwin'"}


def key_of(name: str) -> str:
    """A package's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_closure(name: str, extras: Iterable[str]) -> dict[str, str]:
    """Name → version of everything that `name` with `extras` needs here."""
    seen: dict[str, str] = {}
    todo, done = [(name, frozenset(extras))], set[tuple[str, frozenset[str]]]()
    while todo:
        name, extras = todo.pop()
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        key = key_of(package.metadata["Name"])
        if (key, extras) in done:
            continue
        done.add((key, extras))
        seen[key] = package.version
        for requirement in map(Requirement, package.requires or []):
            is_wanted = requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in extras | {""}
            )
            if is_wanted:
                todo.append((requirement.name, frozenset(requirement.extras)))
    return seen


def main() -> None:
    """Write the file."""
    seen = installed_closure("mlx-qlora", {"dev", "plots"})
    del seen["mlx-qlora"]
    seen |= dict.fromkeys(BACKENDS, seen["mlx"])
    lines = [
        f"{name}=={version}" + (f"; {BACKENDS[name]}" if name in BACKENDS else "")
        for name, version in sorted((ELSEWHERE | seen).items())
    ]
    header = "# The tested set. Rewritten by scripts/update_constraints.py.\n"
    (ROOT / "constraints.txt").write_text(header + "\n".join(lines) + "\n")
    needed = sorted(key_of(requirement.name) for requirement in software.needed())
    tested = {name: seen[name] for name in needed}
    software.TESTED.write_text(json.dumps(tested, indent=2) + "\n")
    print(f"{len(lines)} packages")


if __name__ == "__main__":
    main()
