"""Rewrite constraints.txt from the environment this runs in: the tested set, names and versions only.

Run it in a fresh environment that holds the project with its dev extra:
    .venv/bin/python scripts/update_constraints.py
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
# Needed on macOS by ipykernel, so never installed where this usually runs.
ELSEWHERE = {"appnope": "0.1.4; sys_platform == 'darwin'"}
# One of the two is installed with mlx, by platform; they share its version.
BACKENDS = {"mlx-cpu": "sys_platform == 'linux'", "mlx-metal": "sys_platform == 'darwin'"}


def installed_closure(name: str, extras: frozenset[str], seen: dict[str, str]) -> None:
    """Collect name → version of everything `name` with `extras` needs here, into `seen`."""
    try:
        package = distribution(name)
    except PackageNotFoundError:
        return
    key = re.sub(r"[-_.]+", "-", package.metadata["Name"]).lower()
    seen.setdefault(key, package.version)
    for line in package.requires or []:
        requirement = Requirement(line)
        wanted = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras | {""}
        )
        child = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if wanted and (child not in seen or (child == "mlx-qlora" and requirement.extras - extras)):
            installed_closure(requirement.name, frozenset(requirement.extras), seen)


def main() -> None:
    """Write the file."""
    seen: dict[str, str] = {}
    installed_closure("mlx-qlora", frozenset({"dev", "plots"}), seen)
    del seen["mlx-qlora"]
    seen |= dict.fromkeys(BACKENDS, seen["mlx"])
    lines = [
        f"{name}=={version}" + (f"; {BACKENDS[name]}" if name in BACKENDS else "")
        for name, version in sorted((ELSEWHERE | seen).items())
    ]
    header = "# The tested set. Rewritten by scripts/update_constraints.py.\n"
    (ROOT / "constraints.txt").write_text(header + "\n".join(lines) + "\n")
    print(f"{len(lines)} packages")


if __name__ == "__main__":
    main()
