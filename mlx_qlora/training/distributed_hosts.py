"""The machines of a run, as they are named on the command line or in a hostfile."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from mlx_qlora.errors import ConfigError
from mlx_qlora.training.launcher import RANK_COMMAND, HostsLauncher, Launcher, LocalLauncher, Place

BACKENDS = ("ring", "jaccl")
"""MLX's ways between machines that a Mac can have."""


def launcher_for(
    processes: int = 1,
    *,
    hosts: str | None = None,
    hostfile: Path | None = None,
    backend: str = "ring",
    command: Sequence[str] = RANK_COMMAND,
) -> Launcher:
    """The launcher that the options of ``mlx-qlora train`` and ``infer`` ask for.

    Args:
        command: What each rank runs.

    Raises:
        ConfigError: they do not go together, or a backend is not there.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"There is no backend {backend}.", where="--backend", run="--backend ring")
    if processes > 1 and (hosts or hostfile):
        raise ConfigError("--processes is for ranks on this machine, --hosts for one on each of several.")
    if hosts and hostfile:
        raise ConfigError("The machines are named twice.", where="--hosts, --hostfile")
    _check_backend(backend, hostfile)
    if hostfile is not None:
        return HostsLauncher(read_hostfile(hostfile), backend=backend, hostfile=hostfile, command=command)
    if hosts is not None:
        return HostsLauncher(places_of(hosts), backend=backend, command=command)
    return LocalLauncher(processes, commands=[command] * processes)


def _check_backend(backend: str, hostfile: Path | None) -> None:
    if not mx.distributed.is_available(backend):
        raise ConfigError(f"This build of MLX has no backend {backend}.", where="--backend")
    if backend == "jaccl" and hostfile is None:
        raise ConfigError(
            "jaccl needs a hostfile that names the RDMA devices.",
            where="--hostfile",
            run="mlx.distributed_config --backend jaccl --hosts mac1,mac2 --output-hostfile hosts.json",
        )


def places_of(hosts: str) -> list[Place]:
    """The machines of ``--hosts``: names as ssh knows them, or ``name=address`` for a certain link.

    Raises:
        ConfigError: fewer than two, one that has no address, or the first is not this machine, or others
            cannot reach it.
    """
    pairs = [host.strip().partition("=") for host in hosts.split(",") if host.strip()]
    if len(pairs) < 2:
        raise ConfigError("Several ranks need at least two hosts.", where="--hosts", run="--hosts mac1,mac2")
    places = [Place(name, address or _address(name)) for name, _, address in pairs]
    first = places[0]
    if first.address.startswith("127.") and not all(p.address.startswith("127.") for p in places):
        raise ConfigError(
            f"The other machines cannot reach {first.host} under {first.address}.",
            where="--hosts",
            run=f"--hosts {first.host}=10.0.0.1,…   # the address on the link they share",
        )
    return [_here(first), *places[1:]]


def read_hostfile(path: Path) -> list[Place]:
    """The machines of a hostfile as ``mlx.distributed_config`` writes it.

    Raises:
        ConfigError: it cannot be read, names fewer than two, or the first is not this machine.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        entries = tree["hosts"] if isinstance(tree, dict) else tree
        places = [
            Place(str(entry["ssh"]), str((entry.get("ips") or [_address(entry["ssh"])])[0]))
            for entry in entries
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"The hostfile cannot be read: {error}.",
            where=str(path),
            run="mlx.distributed_config --hosts mac1,mac2 --output-hostfile hosts.json",
        ) from None
    if len(places) < 2:
        raise ConfigError("The hostfile names fewer than two machines.", where=str(path))
    _here(places[0])
    return places


def _address(name: str) -> str:
    try:
        return socket.gethostbyname(name.rpartition("@")[2])
    except OSError as error:
        raise ConfigError(
            f"The host {name} has no address: {error}.", where="--hosts", run=f"--hosts …,{name}=10.0.0.2"
        ) from None


def _here(first: Place) -> Place:
    """The first place, reached without ssh."""
    try:
        with socket.socket() as probe:
            probe.bind((first.address, 0))
    except OSError:
        raise ConfigError(
            f"The first host must be this machine, and {first.host} ({first.address}) is another.",
            where="--hosts",
        ) from None
    return Place("127.0.0.1", first.address, first.prefix)
