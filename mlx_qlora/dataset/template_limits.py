"""What a chat template may take: it is a program that comes with a model, and jinja's sandbox has no clock.

The sandbox that transformers renders in keeps a template from Python's insides. It does not keep one from
looping for ever, or from making a string of gigabytes.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any

import psutil

from mlx_qlora.errors import ModelError

TEMPLATE_BYTES = 1024**2
"""The largest real ones have some 20 kB."""

LIMIT_SECONDS = 10.0
"""For one conversation; rendering one takes less than a millisecond."""

LIMIT_BYTES = 256 * 1024**2
"""By which the process may grow meanwhile, as far as a look every few milliseconds sees it."""

LARGEST_NUMBER = 1_000_000


class _TimeIsUpError(BaseException):
    """Raised inside of a template; no template can catch it."""


class _MemoryIsUpError(_TimeIsUpError):
    """The same, for memory."""


@lru_cache(maxsize=64)
def check_template(template: str) -> None:
    """Refuse a template that is too large, or that multiplies itself into memory.

    Raises:
        ModelError: it is; or it is no template at all.
    """
    if len(template.encode("utf-8", "surrogatepass")) > TEMPLATE_BYTES:
        raise ModelError(f"The chat template is larger than {TEMPLATE_BYTES // 1024**2} MiB.")
    from jinja2 import Environment, TemplateSyntaxError, nodes

    try:
        # Parsed here, never rendered: nothing to escape.
        tree = Environment(extensions=_transformers_extensions()).parse(template)  # nosec B701
    except (TemplateSyntaxError, RecursionError, MemoryError) as error:
        raise ModelError(f"The chat template is broken: {error}") from None
    found = ["a power"] if tree.find(nodes.Pow) else []
    found += [
        "a string times a number"
        for node in tree.find_all(nodes.Mul)
        if any(
            isinstance(side, nodes.Const) and isinstance(side.value, str) for side in (node.left, node.right)
        )
    ]
    found += [
        f"the number {node.value}"
        for node in tree.find_all(nodes.Const)
        if isinstance(node.value, int) and abs(node.value) > LARGEST_NUMBER
    ]
    if any(node.name == "center" for node in tree.find_all(nodes.Filter)):
        found.append("the filter center")
    if found:
        raise ModelError(
            f"The chat template does what no chat template needs to do: {', '.join(sorted(set(found)))}."
        )


@cache
def _transformers_extensions() -> tuple[Any, ...]:
    """Transformers' own tag, {% generation %}."""
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template
    except ImportError:
        return ()
    environment: Any = _compile_jinja_template("").environment
    return tuple(type(extension) for extension in environment.extensions.values())


@contextmanager
def time_limit(seconds: float = LIMIT_SECONDS) -> Iterator[None]:
    """Stop what runs inside, Python code of this thread, when its time is up, or its memory.

    Raises:
        ModelError: it was.
    """
    deadline = _Deadline(threading.get_ident(), time.monotonic() + seconds)
    _WATCHDOG.watch(deadline)
    try:
        yield
    except _MemoryIsUpError:
        raise ModelError(f"The chat template took more than {LIMIT_BYTES // 1024**2} MiB.") from None
    except _TimeIsUpError:
        raise ModelError(f"The chat template ran for more than {seconds:g} seconds.") from None
    finally:
        _WATCHDOG.forget(deadline)


class _Deadline:
    """When which thread must be through."""

    def __init__(self, thread: int, at: float) -> None:
        self.thread, self.at = thread, at
        self.most_bytes: int | None = None
        """Of the process; known from the first look on, which few conversations live to see."""


class _Watchdog:
    """One thread that looks at all deadlines again and again; it runs only while there are any."""

    PERIOD_SECONDS = 0.01

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._deadlines: list[_Deadline] = []
        self._thread: threading.Thread | None = None
        self._process = psutil.Process()

    def watch(self, deadline: _Deadline) -> None:
        """Begin to."""
        with self._lock:
            self._deadlines.append(deadline)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mlx_qlora-templates", daemon=True)
                self._thread.start()
            elif len(self._deadlines) == 1:
                self._lock.notify()

    def forget(self, deadline: _Deadline) -> None:
        """It is through; nothing is raised in its thread from here on."""
        with self._lock:
            if deadline in self._deadlines:
                self._deadlines.remove(deadline)
            else:  # raised already, perhaps not noticed yet
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(deadline.thread), None)

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._deadlines:
                    self._lock.wait()
                now, used = time.monotonic(), self._process.memory_info().rss
                for deadline in list(self._deadlines):
                    deadline.most_bytes = deadline.most_bytes or used + LIMIT_BYTES
                    if deadline.at <= now or used > deadline.most_bytes:
                        error = _TimeIsUpError if deadline.at <= now else _MemoryIsUpError
                        self._deadlines.remove(deadline)
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(
                            ctypes.c_ulong(deadline.thread), ctypes.py_object(error)
                        )
            time.sleep(self.PERIOD_SECONDS)


_WATCHDOG = _Watchdog()
