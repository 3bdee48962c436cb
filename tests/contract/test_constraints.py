"""constraints.txt pins everything that the project needs, on every platform that it supports."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
DECLARED = [
    line
    for part in (PROJECT["dependencies"], *(PROJECT["optional-dependencies"][e] for e in ("plots", "dev")))
    for line in part
    if not line.startswith("mlx-qlora")
]
PLATFORMS = {
    "linux": {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"},
    "macos": {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(environment: dict[str, str]) -> dict[str, str]:
    """Name → version of the lines that hold in `environment`."""
    lines = [Requirement(line) for line in LINES]
    kept = [line for line in lines if line.marker is None or line.marker.evaluate(environment)]
    return {canonical(line.name): str(line.specifier).removeprefix("==") for line in kept}


def closure(environment: dict[str, str]) -> set[str]:
    """Every package that the declared ones bring in `environment`, as far as they are installed here."""
    todo, seen = [Requirement(line) for line in DECLARED], set()
    done: set[tuple[str, frozenset[str]]] = set()
    while todo:
        parent = todo.pop()
        key = (canonical(parent.name), frozenset(parent.extras))
        seen.add(key[0])
        if key in done:
            continue
        done.add(key)
        try:
            children = [Requirement(line) for line in requires(parent.name) or []]
        except PackageNotFoundError:
            continue
        todo += [
            child
            for child in children
            if child.marker is None
            or any(child.marker.evaluate(environment | {"extra": extra}) for extra in {"", *parent.extras})
        ]
    return seen


def test_each_line_is_one_exact_version_and_no_place_to_get_it_from():
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*(; \S.*)?", line) for line in LINES)
    names = [line.partition("==")[0] for line in LINES]
    assert names == sorted(set(names))


@pytest.mark.parametrize("line", DECLARED)
def test_a_declared_dependency_allows_its_pin(line):
    requirement = Requirement(line)
    platform = "macos" if requirement.marker and "darwin" in str(requirement.marker) else "linux"
    assert requirement.specifier.contains(pins(PLATFORMS[platform])[canonical(requirement.name)])


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_nothing_that_gets_installed_is_left_unpinned(platform, python):
    environment = PLATFORMS[platform] | {"python_version": python, "python_full_version": f"{python}.0"}
    assert closure(environment) - pins(environment).keys() == set()


def test_this_environment_is_the_tested_set():
    """Another set may work as well, but then a failure here would be no news about ours."""
    other = {name: (version(name), pin) for name, pin in pins({}).items() if version(name) != pin}
    assert not other
