"""Events of a run as messages between processes, and back."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mlx_qlora.memory.monitor import MemorySample
from mlx_qlora.training.distributed_messages import Message
from mlx_qlora.training.events import Event


def event_message(event: Event) -> Message:
    """An event as a message."""
    return {"event": type(event).__name__, "fields": asdict(event)}


def event_of(message: Message) -> Event:
    """The event that `event_message` made a message of.

    Raises:
        ValueError: there is no such event, or its fields are others.
    """
    cls = next((kind for kind in get_args(Event) if kind.__name__ == message["event"]), None)
    given = message["fields"]
    if cls is None or {each.name for each in fields(cls)} != given.keys():
        raise ValueError(f"no event of ours: {message['event']}")
    types = get_type_hints(cls)
    event: Event = cls(**{name: _value(types[name], value) for name, value in given.items()})
    return event


def _value(kind: Any, value: Any) -> Any:
    if kind is MemorySample:
        return MemorySample(**value)
    if kind is Path:
        return Path(value)
    return tuple(value) if isinstance(value, list) else value
