"""Files of somebody who means harm: refused, with nothing run, nothing read elsewhere, nothing given away."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.harness import CLI, QUICK, Bench, Row, Scale, finish, said_badly

LIMIT_BYTES = 1024**3
LIMIT_SECONDS = 60.0
SECRET = "hf_CanaryCanaryCanaryCanaryCanaryCana"  # of a token's form
_PICKLE = b"cos\nsystem\n(S'touch %s'\ntR."


def files(bench: Bench, scale: Scale) -> list[Row]:
    """Models, adapters, configurations and archives that would run, read or allocate something.

    In the quick form every fourth of them.
    """
    stride = 1 if scale.stages > QUICK.stages else 4
    row = Row(
        "security",
        "a model, adapter or configuration made to do harm",
        "exit code 2 and one clear error within 60 s and 1 GiB; nothing run, nothing read elsewhere",
    )
    adapter = bench.folder / "adapter"
    done = finish(bench.train_command(adapter), bench.environment())
    if done.returncode:
        raise RuntimeError(done.stderr)
    secret = bench.folder / "secret.json"
    secret.write_text(json.dumps({"secret": SECRET}), encoding="utf-8")
    for name, harm in list(_MODELS.items())[::stride]:
        row.note(_tried(bench, name, harm, bench.model, lambda path: _ask("--model", path)))
    for name, harm in list(_ADAPTERS.items())[::stride]:
        row.note(_tried(bench, name, harm, adapter, lambda path: _ask("--adapter-path", path)))
    for name, text in list(_CONFIGS.items())[::stride]:
        row.note(_tried_config(bench, name, text))
    return [row, _leaks(bench, adapter)]


def _ask(option: str, path: Path) -> list[str]:
    return [*CLI, "infer", "o clube?", "--max-tokens", "4", option, str(path)]


def _tried(
    bench: Bench,
    name: str,
    harm: Callable[[Path, Path], None],
    good: Path,
    command: Callable[[Path], list[str]],
) -> str | None:
    folder = bench.folder / "hostile"
    folder.unlink() if folder.is_file() else shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder, ignore=shutil.ignore_patterns("checkpoints"))
    harm(folder, bench.folder)
    return _judged(bench, name, command(folder))


def _tried_config(bench: Bench, name: str, text: str) -> str | None:
    path = bench.folder / "hostile.yaml"
    path.write_text(text.replace("CANARY", str(_canary(bench.folder))), encoding="utf-8")
    command = [*bench.train_command(bench.folder / "never"), "--config", str(path)]
    return _judged(bench, name, command)


def _judged(bench: Bench, name: str, command: list[str]) -> str | None:
    """What went wrong with how a command took it."""
    started, out = time.monotonic(), bench.folder / "out"
    with out.open("w+", encoding="utf-8", errors="replace") as file:
        process = subprocess.Popen(command, env=bench.environment(), stdout=file, stderr=file)
        watch = threading.Timer(2 * LIMIT_SECONDS, process.kill)
        watch.start()
        _, status, used = os.wait4(process.pid, 0)
        watch.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
    said = out.read_text(encoding="utf-8", errors="replace")
    problem = said_badly(subprocess.CompletedProcess(command, process.returncode, said, said))
    if (seconds := time.monotonic() - started) > LIMIT_SECONDS:
        problem = f"took {seconds:.0f} s"
    if (peak := used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)) > LIMIT_BYTES:
        problem = f"took {peak / 1024**2:.0f} MiB"
    if _canary(bench.folder).exists():
        _canary(bench.folder).unlink()
        problem = "its code was run"
    if SECRET in said:
        problem = "a file elsewhere was read and shown"
    return f"{name}: {problem}" if problem else None


def _canary(parent: Path) -> Path:
    return parent / "canary"


def _edited(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}), encoding="utf-8")


def _pickled(folder: Path, parent: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(_PICKLE % str(_canary(parent)).encode())


def _pickle_in_safetensors(folder: Path, parent: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.write_bytes(_PICKLE % str(_canary(parent)).encode())


def _own_code(folder: Path, parent: Path) -> None:
    (folder / "mine.py").write_text(f"open({str(_canary(parent))!r}, 'w')\n", encoding="utf-8")
    _edited(folder / "config.json", model_file="mine.py")


def _automap(folder: Path, parent: Path) -> None:
    _own_code(folder, parent)
    _edited(
        folder / "config.json",
        model_file=None,
        model_type="mine",
        auto_map={"AutoModelForCausalLM": "mine.M"},
    )


def _index(target: str) -> Callable[[Path, Path], None]:
    def harm(folder: Path, parent: Path) -> None:
        weights = folder / "model.safetensors"
        shutil.move(weights, parent / "elsewhere.safetensors")
        names = json.loads(_header(parent / "elsewhere.safetensors"))
        (folder / "model-00001-of-00001.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
        target_name = target.replace("PARENT", str(parent))
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, target_name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")

    return harm


def _header(path: Path) -> bytes:
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + size]


def _linked(name: str) -> Callable[[Path, Path], None]:
    def harm(folder: Path, parent: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(parent / "secret.json")

    return harm


def _template(text: str) -> Callable[[Path, Path], None]:
    def harm(folder: Path, parent: Path) -> None:
        source = text.replace("CANARY", str(_canary(parent)))
        for path in folder.glob("*.jinja"):
            path.unlink()
        _edited(folder / "tokenizer_config.json", chat_template=source)

    return harm


def _safetensors(header: bytes | dict[str, object]) -> Callable[[Path, Path], None]:
    def harm(folder: Path, _parent: Path) -> None:
        said = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = next(folder.glob("*.safetensors"))
        path.write_bytes(struct.pack("<Q", len(said)) + said + b"\0" * 64)

    return harm


def _huge_header(folder: Path, _parent: Path) -> None:
    next(folder.glob("*.safetensors")).write_bytes(struct.pack("<Q", 2**62) + b"{}")


def _deep_json(name: str) -> Callable[[Path, Path], None]:
    def harm(folder: Path, _parent: Path) -> None:
        (folder / name).write_text("[" * 200_000 + "]" * 200_000, encoding="utf-8")

    return harm


def _archive(folder: Path, parent: Path) -> None:
    """A tar file in the model's place, with a member that climbs out of it."""
    (parent / "bait").write_text("x", encoding="utf-8")
    shutil.rmtree(folder)
    with tarfile.open(folder, "w:gz") as archive:
        archive.add(parent / "bait", arcname=f"../{_canary(parent).name}")


def _zip_weights(folder: Path, parent: Path) -> None:
    import zipfile

    path = next(folder.glob("*.safetensors"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"../{_canary(parent).name}", "x")


def _huge(name: str, value: object) -> Callable[[Path, Path], None]:
    return lambda folder, _parent: _edited(folder / "config.json", **{name: value})


_SSTI = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "{{ self.__init__.__globals__.__builtins__.open('CANARY', 'w') }}",
    "{% include 'config.json' %}",
    "{% import 'os' as os %}{{ os.system('touch CANARY') }}",
    "{% for i in range(10 ** 9) %}{% endfor %}x",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x",
    "{{ 'x' * 10 ** 10 }}",
    "{{ 'x' | center(10 ** 10) }}",
    "{{ '%099999999999d' | format(1) }}",
    "{% set x = namespace(v='xx') %}{% for i in range(60) %}{% set x.v = x.v ~ x.v %}{% endfor %}{{ x.v }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ raise_exception('no') }}",
    "{% if %}",
)

_HUGE_SHAPE = {"x": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 64]}}
_OVERLAP = {
    name: {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} for name in ("a.weight", "b.weight")
}
_NEGATIVE = {"x": {"dtype": "F32", "shape": [-16], "data_offsets": [-64, 0]}}

_MODELS: dict[str, Callable[[Path, Path], None]] = {
    "pickled weights": _pickled,
    "a pickle called safetensors": _pickle_in_safetensors,
    "a folder with code": _own_code,
    "an automap to code": _automap,
    "an index that climbs": _index("../elsewhere.safetensors"),
    "an index with an absolute path": _index("PARENT/elsewhere.safetensors"),
    "an index through a folder": _index("x/../../elsewhere.safetensors"),
    "an index to a device": _index("/dev/zero"),
    **{
        f"a link out, {name}": _linked(name)
        for name in (
            "tokenizer_config.json",
            "added_tokens.json",
            "config.json",
            "tokenizer.json",
            "README.md",
        )
    },
    **{f"template {number}": _template(text) for number, text in enumerate(_SSTI)},
    "a header of 4 EiB": _huge_header,
    "a tensor of 4 EiB": _safetensors(_HUGE_SHAPE),
    "tensors that overlap": _safetensors(_OVERLAP),
    "a negative shape": _safetensors(_NEGATIVE),
    "a header nested deeply": _safetensors(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    **{
        f"JSON nested deeply, {name}": _deep_json(name)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json")
    },
    "an archive that climbs": _archive,
    "an archive for weights": _zip_weights,
    "two billion layers": _huge("num_hidden_layers", 2**31),
    "a vocabulary of 2 ** 40": _huge("vocab_size", 2**40),
    "no heads": _huge("num_attention_heads", 0),
    "a negative width": _huge("hidden_size", -64),
    "a text for a number": _huge("num_hidden_layers", "__import__('os')"),
    "an architecture that climbs": _huge("model_type", "../../mine"),
}


def _adapter_config(**changes: object) -> Callable[[Path, Path], None]:
    return lambda folder, _parent: _edited(folder / "adapter_config.json", **changes)


def _adapter_model(model: str) -> Callable[[Path, Path], None]:
    """Another base in what the adapter remembers, with the digest that belongs to it."""

    def harm(folder: Path, _parent: Path) -> None:
        from mlx_qlora.lora.adapter import INFO_DIGEST, OURS, AdapterInfo, _info_sha256

        path = folder / "adapter_config.json"
        tree = json.loads(path.read_text())
        tree[OURS]["model"]["path"] = model
        tree[INFO_DIGEST] = _info_sha256(AdapterInfo.model_validate(tree[OURS]))
        path.write_text(json.dumps(tree), encoding="utf-8")

    return harm


_ADAPTERS: dict[str, Callable[[Path, Path], None]] = {
    "an adapter that is a pickle": _pickle_in_safetensors,
    "an adapter with a header of 4 EiB": _huge_header,
    "an adapter with a tensor of 4 EiB": _safetensors(_HUGE_SHAPE),
    "an adapter's configuration nested deeply": _deep_json("adapter_config.json"),
    "an adapter of nothing known": _adapter_config(mlx_qlora={}),
    "an adapter of a base that climbs": _adapter_model("../../../../../../etc"),
    "an adapter of a base on a device": _adapter_model("/dev/zero"),
    "an adapter of a base with a scheme": _adapter_model("file:///etc/passwd"),
    "an adapter of an option": _adapter_model("--trust-remote-code"),
}

_BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
_CONFIGS = {
    "YAML that builds an object": "training: !!python/object/apply:os.system ['touch CANARY']\n",
    "YAML that imports": "training: !!python/name:os.system\n",
    "YAML with a billion laughs": _BOMB + "training: {max_steps: *a9}\n",
    "YAML nested deeply": "training: " + "[" * 20_000 + "]" * 20_000 + "\n",
    "YAML that refers to itself": "training: &x {seed: *x}\n",
    "YAML that is a list": "- a\n- b\n",
    "YAML with control characters": "training: {seed: \x00\x07}\n",
    "YAML of two documents": "a: 1\n---\nb: 2\n",
}


def _leaks(bench: Bench, adapter: Path) -> Row:
    """Train, fail, ask and plan a publication with a token in the environment; then look everywhere."""
    row = Row(
        "security",
        "a hub token and an API key in the environment",
        "in no file and in no output of a command",
    )
    secrets = {"HF_TOKEN": SECRET, "MLX_QLORA_API_KEY": SECRET, "WANDB_API_KEY": SECRET}
    environment = bench.environment(**secrets)
    made = bench.folder / "with-token"
    commands = {
        "train": bench.train_command(made),
        "a model that is not there": [*CLI, "infer", "x", "--model", "nobody/nothing"],
        "push": [*CLI, "push", str(adapter), "--repo", "ana/x", "--base-model", "ana/base", "--dry-run"],
        "infer": _ask("--adapter-path", made),
    }
    for name, command in commands.items():
        done = finish(command, environment)
        said = f"{name}: in its output" if SECRET in done.stdout + done.stderr else None
        row.note(said)
    for folder in (made, bench.folder / "cache"):
        files = [path for path in folder.rglob("*") if path.is_file() and os.access(path, os.R_OK)]
        found = [path.name for path in files if SECRET.encode() in path.read_bytes()]
        row.note(f"in {found}" if found else None)
    return row
