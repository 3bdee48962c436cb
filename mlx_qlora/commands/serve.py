"""``mlx-qlora serve``."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from mlx_qlora.commands.output import on_bytes, say
from mlx_qlora.errors import ConfigError

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def serve(
    model: Annotated[str, typer.Option(help="Base model: hub id or folder.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="An adapter under the name clients ask for: farense=adapters/farense."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address; others than this machine's own need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    scheme: Annotated[str | None, typer.Option(help="How to store the base: int4, int8, …, none.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the key clients must send; else MLX_QLORA_API_KEY.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A host name this server is known under, behind a proxy.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="An origin whose pages may ask: https://example.org.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers generated together.")] = 16,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are refused.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer a client may ask for.")] = 4096,
    max_body_mib: Annotated[float, typer.Option(min=0.001, help="Largest request body.")] = 2.0,
    request_seconds: Annotated[float, typer.Option(min=0.1, help="Longest time for one answer.")] = 600.0,
    stalled_seconds: Annotated[
        float, typer.Option(min=0.1, help="Until a client that stops reading is cut off.")
    ] = 30.0,
    drain_seconds: Annotated[
        float, typer.Option(min=0.0, help="For running answers to end after SIGTERM.")
    ] = 30.0,
    prompt_cache_mib: Annotated[
        float | None, typer.Option(min=0.0, help="Memory for prompts seen before; 0 is none.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Allow the model folder's own code.")] = False,
) -> None:
    """Serve a base model and its adapters over HTTP, as OpenAI's clients expect it.

    Example: mlx-qlora serve --model models/mistral-int4 --adapter farense=adapters/farense

    A request's `model` picks the adapter by name; `base` is none. http://127.0.0.1:8080 is a page to try it,
    /health and /metrics are for machines. Ctrl-C lets running answers end, a second one stops at once.
    """
    check_packages()
    from mlx_qlora.config import QuantizationConfig
    from mlx_qlora.serving.app import Access, Service, build_app, public_name, served_names
    from mlx_qlora.serving.limits import MIB, Limits
    from mlx_qlora.serving.process import ServerProcess, bound_socket, url_of
    from mlx_qlora.serving.security import check_exposure, read_key

    adapters = adapters_by_name(adapter or [])
    served_names(public_name(model), list(adapters))
    key = read_key(api_key_file)
    check_exposure(host, key, allow_origin or [])
    with bound_socket(host, port) as bound:
        from mlx_qlora.serving.engine import Engine
        from mlx_qlora.serving.metrics import Metrics

        process = ServerProcess(say)
        times: list[Metrics] = []
        cache = {} if prompt_cache_mib is None else {"prompt_cache_bytes": int(prompt_cache_mib * MIB)}
        engine = Engine.start(
            model,
            adapters,
            max_batch=max_batch,
            max_queue=max_queue,
            quantization=QuantizationConfig(scheme=scheme) if scheme else None,
            revision=revision,
            trust_remote_code=trust_remote_code,
            on_bytes=on_bytes("Quantizing"),
            on_death=process.on_death,
            observe=lambda name, seconds: times[0].observe(name, seconds) if times else None,
            **cache,
        )
        times.append(Metrics(engine.stats))
        limits = Limits(
            body_bytes=int(max_body_mib * MIB),
            max_tokens=max_tokens,
            request_seconds=request_seconds,
            stalled_seconds=stalled_seconds,
            drain_seconds=drain_seconds,
        )
        names = served_names(public_name(model), engine.adapter_names)
        service = Service(engine=engine, metrics=times[0], limits=limits, names=names, log=say)
        access = Access(key=key, names=(host, *(allow_host or [])), origins=tuple(allow_origin or ()))
        ready = f"Serving {url_of(bound)} · models: {', '.join(names)}" + (" · with a key" if key else "")
        code = process.run(build_app(service, access), service, bound, lambda: print(ready, flush=True))
        raise typer.Exit(code)


def check_packages() -> None:
    """Say what to install when the server's own packages are not there.

    Raises:
        ConfigError: at least one of `PACKAGES` is missing.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"The server needs packages that are not installed: {', '.join(missing)}.",
            run="pip install 'mlx-qlora[serve]'",
        )


def adapters_by_name(pairs: list[str]) -> dict[str, Path]:
    """The folders given as NAME=PATH.

    Raises:
        ConfigError: a pair is not one, or a name is taken or would not stand in a URL.
    """
    found: dict[str, Path] = {}
    example = "mlx-qlora serve --model M --adapter farense=adapters/farense"
    for pair in pairs:
        name, separator, path = pair.partition("=")
        if not separator or not path:
            raise ConfigError(f"--adapter takes NAME=PATH, not {pair!r}.", run=example)
        if not _ADAPTER_NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} is no adapter name: letters, digits, - _ . and at most 64.", run=example
            )
        if name in found:
            raise ConfigError(f"Two adapters have the name {name!r}.", run=example)
        found[name] = Path(path)
    return found
