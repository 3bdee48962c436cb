"""Python, the packages against the tested set, and what MLX computes on."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mlx_qlora.blas import SWITCH, blas_is_fast, load_system_blas
from mlx_qlora.machine.finding import Finding
from mlx_qlora.machine.system import System

PACKAGE = "mlx-qlora"
TESTED = Path(__file__).with_name("tested_versions.json")
"""Name → version, of what the package needs to run; rewritten by scripts/update_constraints.py."""

Installed = Callable[[str], str]
"""The version of an installed package; raises PackageNotFoundError."""


def python(system: System, machine: str | None = None) -> Iterator[Finding]:
    """Its version and architecture: an Intel Python on Apple silicon cannot load MLX.

    Args:
        machine: What Python was built for; asked of this one when not given.
    """
    machine, here = machine or platform.machine(), platform.python_version()
    where = "in a virtual environment" if sys.prefix != sys.base_prefix else "not in a virtual environment"
    text = f"{here}, {machine}, {where}"
    facts = {"version": here, "machine": machine, "executable": sys.executable}
    wanted = metadata(PACKAGE)["Requires-Python"]
    if machine == "x86_64" and system.sysctl("hw.optional.arm64").get("hw.optional.arm64") == "1":
        yield Finding(
            "Python",
            "problem",
            f"{here} is built for Intel and runs under Rosetta, where MLX does not work",
            "arch -arm64 /opt/homebrew/bin/python3.13 -m venv .venv"
            "   # after: arch -arm64 brew install python@3.13",
            facts,
        )
    elif not SpecifierSet(wanted).contains(here, prereleases=True):
        yield Finding(
            "Python",
            "problem",
            f"{here} is not supported; it must be {wanted}",
            "brew install python@3.13" if system.is_mac else system.install(*["python3.13"] * 4),
            facts,
        )
    else:
        yield Finding("Python", "ok", text, facts=facts)


def packages(installed: Installed = version, tested: Mapping[str, str] | None = None) -> Iterator[Finding]:
    """Installed versions, against those that are allowed and those that were tested together."""
    tested = tested_versions() if tested is None else tested
    here, missing, refused = dict[str, str](), list[Requirement](), list[Requirement]()
    for requirement in needed():
        try:
            here[_key(requirement)] = installed(requirement.name)
        except PackageNotFoundError:
            missing.append(requirement)
            continue
        if not requirement.specifier.contains(here[_key(requirement)], prereleases=True):
            refused.append(requirement)
    facts = {"installed": here, "tested": dict(tested)}
    if missing or refused:
        said = [f"{r.name} is missing" for r in missing]
        said += [f"{r.name} {here[_key(r)]} is not {r.specifier}" for r in refused]
        wanted = [f'"{r.name}{_extras(r)}{_pin(r, tested)}"' for r in missing + refused]
        yield Finding(
            "packages", "problem", "; ".join(said), f"python -m pip install {' '.join(wanted)}", facts
        )
        return
    other = {name: v for name, v in here.items() if name in tested and v != tested[name]}
    if other:
        said = [f"{name} {v} ({tested[name]})" for name, v in other.items()]
        pins = " ".join(f'"{name}=={tested[name]}"' for name in other)
        text = f"not the versions tested together, which stand in brackets: {', '.join(said)}"
        yield Finding("packages", "warning", text, f"python -m pip install {pins}", facts)
    else:
        first = ", ".join(f"{name} {here[name]}" for name in ("mlx", "mlx-lm") if name in here)
        yield Finding(
            "packages", "ok", f"{first} and {len(here) - 2} others are the tested ones", facts=facts
        )


def tested_versions() -> dict[str, str]:
    """The versions that were tested together, by name, as far as they are needed on this platform."""
    pins: dict[str, str] = json.loads(TESTED.read_text(encoding="utf-8"))
    return pins


def needed(package: str = PACKAGE) -> list[Requirement]:
    """What a package needs on this platform, without its extras."""
    found = [Requirement(line) for line in requires(package) or []]
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]


def backend(system: System) -> Iterator[Finding]:
    """What MLX computes on: Metal on a Mac; a CPU or CUDA on Linux."""
    import mlx.core as mx

    info = dict(mx.device_info())
    name = str(info.get("device_name", "unknown device"))
    facts = {"device": mx.default_device().type.name, "name": name, "has_metal": mx.metal.is_available()}
    if system.is_mac and not mx.metal.is_available():
        yield Finding(
            "Metal",
            "problem",
            "MLX finds no Metal device: a virtual machine, an old macOS, or a broken installation",
            "python -m pip install --force-reinstall mlx mlx-metal   # outside a virtual machine",
            facts,
        )
    elif system.is_mac:
        yield Finding("Metal", "ok", f"available, {name}", facts=facts)
    elif _two_backends():
        yield Finding(
            "backend",
            "problem",
            f"two backends of MLX overwrite each other in one folder: {', '.join(_two_backends())}",
            f"python -m pip uninstall -y mlx {' '.join(_two_backends())}"
            ' && python -m pip install "mlx[cuda13]"',
            facts,
        )
    else:
        kind = "CUDA" if facts["device"] == "gpu" else "CPU"
        yield Finding("backend", "ok", f"{kind}, {name}", facts=facts)


def blas(system: System) -> Iterator[Finding]:
    """Whether a CPU's dense products are fast; MLX's own BLAS on Linux is the reference one."""
    if system.is_mac or any(name.startswith("mlx-cuda") for name in _backends()):
        return
    name = load_system_blas()
    if blas_is_fast():
        yield Finding("BLAS", "ok", name or "preloaded", facts={"library": name})
    elif os.environ.get(SWITCH):
        text = f"{SWITCH}={os.environ[SWITCH]} leaves MLX its own, which is several times slower"
        yield Finding("BLAS", "warning", text, f"unset {SWITCH}", {"library": None})
    else:
        yield Finding(
            "BLAS",
            "warning",
            "there is none but MLX's own; training is several times faster with OpenBLAS",
            system.install("libopenblas0", "openblas-threads", "openblas", "libopenblas_pthreads0"),
            {"library": None},
        )


def compiler(system: System, which: Callable[[str], str | None] = shutil.which) -> Iterator[Finding]:
    """g++, with which MLX makes fused kernels for a CPU; it runs without."""
    if system.is_mac:
        return
    path = which("g++")
    if path is not None:
        yield Finding(
            "compiler", "ok", f"{path} (MLX fuses operations of a CPU with it)", facts={"path": path}
        )
        return
    yield Finding(
        "compiler",
        "warning",
        "g++ is not there: MLX cannot fuse operations on the CPU",
        system.install("g++", "gcc-c++", "gcc", "gcc-c++"),
        {"path": None},
    )


def _backends() -> list[str]:
    names = []
    for name in ("mlx-cpu", "mlx-cuda", "mlx-cuda-12", "mlx-cuda-13"):
        try:
            version(name)
        except PackageNotFoundError:
            continue
        names.append(name)
    return names


def _two_backends() -> list[str]:
    found = _backends()
    return found if len(found) > 1 else []


def _key(requirement: Requirement) -> str:
    return re.sub(r"[-_.]+", "-", requirement.name).lower()


def _extras(requirement: Requirement) -> str:
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


def _pin(requirement: Requirement, tested: Mapping[str, str]) -> str:
    pin = tested.get(_key(requirement))
    return f"=={pin}" if pin else str(requirement.specifier)
