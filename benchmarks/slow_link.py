"""A slow, lossy link between two network namespaces of this machine, for real TCP. Linux, as root.

    sudo python benchmarks/slow_link.py --delay 0.02 --loss 0.01 --rate 1e8

Linux's own netem is not in every kernel. Here each namespace has a tun device, and this process carries IP
packets from one to the other: it keeps each for `delay` seconds, sends at most `rate` bits a second, and
loses a seeded random share. Whatever is lost TCP sends again, as it would on a real link. Stop the process,
and the link is down. It ends when its standard input does.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import heapq
import os
import random
import selectors
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h


@dataclass(frozen=True)
class Link:
    """Two namespaces, and the process that carries packets between them."""

    namespaces: tuple[str, str]
    addresses: tuple[str, str]
    carrier: subprocess.Popen[bytes]


def why_not() -> str | None:
    """Why this machine can have no such link; None when it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    if not Path("/dev/net/tun").exists() or shutil.which("ip") is None:
        return "there is no /dev/net/tun or no ip command"
    tried = subprocess.run(["ip", "netns", "add", "mlxq-try"], capture_output=True)
    subprocess.run(["ip", "netns", "del", "mlxq-try"], capture_output=True)
    return None if tried.returncode == 0 else "network namespaces cannot be made here"


@contextmanager
def slow_link(
    *, delay_seconds: float = 0.0, loss: float = 0.0, bits_per_second: float = 0.0
) -> Iterator[Link]:
    """A link that is there while the context is open; a rate of 0 is no limit."""
    names = (f"mlxq-{os.getpid()}-a", f"mlxq-{os.getpid()}-b")
    addresses = ("10.177.0.1", "10.177.0.2")
    carrier = None
    try:
        for name in names:
            _ip("netns", "add", name)
        options = ["--delay", str(delay_seconds), "--loss", str(loss), "--rate", str(bits_per_second)]
        carrier = subprocess.Popen(
            [sys.executable, __file__, *options, "--between", *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        if carrier.stdout is None or carrier.stdout.readline() != b"ready\n":
            raise RuntimeError("the carrier of the slow link did not start")
        for name, address in zip(names, addresses, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "slow")
            _ip("-n", name, "link", "set", "slow", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield Link(names, addresses, carrier)
    finally:
        if carrier is not None:
            carrier.kill()
            carrier.communicate()
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def carry(ends: tuple[int, int], delay: float, loss: float, rate: float) -> None:
    """Carry packets both ways between two tun devices until standard input ends."""
    chance, due, free_at, number = random.Random(0), [], [0.0, 0.0], 0
    selector = selectors.DefaultSelector()
    for side, end in enumerate(ends):
        os.set_blocking(end, False)
        selector.register(end, selectors.EVENT_READ, side)
    selector.register(sys.stdin.fileno(), selectors.EVENT_READ, None)
    while True:
        wait = max(0.0, due[0][0] - time.monotonic()) if due else None
        for key, _ in selector.select(wait):
            if key.data is None:
                return
            side, now = key.data, time.monotonic()
            packet = os.read(ends[side], 65536)
            free_at[side] = max(free_at[side], now) + (len(packet) * 8 / rate if rate else 0.0)
            if chance.random() >= loss and free_at[side] - now < 0.5:  # a queue of half a second, then drops
                heapq.heappush(due, (free_at[side] + delay, number, 1 - side, packet))
                number += 1
        while due and due[0][0] <= time.monotonic():
            _, _, side, packet = heapq.heappop(due)
            with suppress(OSError):  # the device is not up yet, or full: a lost packet
                os.write(ends[side], packet)


def open_tun(namespace: str) -> int:
    """The descriptor of a new tun device ``slow`` in a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{namespace}") as entrance:
        if libc.setns(entrance.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"slow", _IFF_TUN | _IFF_NO_PI))
    return device


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def main() -> None:
    """Carry between two namespaces, or show what ping says of a link like this."""
    parser = argparse.ArgumentParser(description="A slow, lossy link between two network namespaces.")
    parser.add_argument("--delay", type=float, default=0.02, help="seconds each way")
    parser.add_argument("--loss", type=float, default=0.01, help="share of packets lost each way")
    parser.add_argument("--rate", type=float, default=0.0, help="bits a second each way; 0 is no limit")
    parser.add_argument("--between", nargs=2, help="names of two namespaces that are there")
    options = parser.parse_args()
    if options.between:
        ends = (open_tun(options.between[0]), open_tun(options.between[1]))
        print("ready", flush=True)
        carry(ends, options.delay, options.loss, options.rate)
        return
    reason = why_not()
    if reason is not None:
        raise SystemExit(reason)
    with slow_link(delay_seconds=options.delay, loss=options.loss, bits_per_second=options.rate) as link:
        pinged = [
            "ip",
            "netns",
            "exec",
            link.namespaces[0],
            "ping",
            "-c",
            "10",
            "-i",
            "0.2",
            link.addresses[1],
        ]
        subprocess.run(pinged, check=False)


if __name__ == "__main__":
    main()
