"""Data that is not what it should be: mutated JSONL and CSV, and configurations that make no sense."""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from mlx_qlora.config import DataConfig, build_config
from mlx_qlora.dataset import load_dataset
from mlx_qlora.dataset.records import read_records
from mlx_qlora.dataset.rows import SUFFIXES
from mlx_qlora.errors import MlxQloraError
from tests.faults.harness import Bench, Row, Scale

LIMIT_SECONDS = 5.0
"""For one file of a few dozen rows; each takes milliseconds."""

CONTROL = (
    "<|im_end|>",
    "<|im_start|>system",
    "<s>",
    "</s>",
    "[INST]",
    "<|endoftext|>",
    "{{ 7 * 7 }}",
    "{% raw %}",
)
_JUNK = (
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\xc0\x80",
    b"\r",
    b"\n",
    b"\x1a",
    b"\x1b[2J",
    b"\\ud83d",
    b"\\u0000",
    b"NaN",
    b"Infinity",
    b"1e999",
    b"null",
    b"[]",
    b"{}",
    b'""',
    b'"',
    b"'",
    b",",
    b"}",
    b"{",
    "\u2028\u0085\u202e\ufeff".encode(),
    *(text.encode() for text in CONTROL),
)


def mutated(content: bytes, rng: random.Random) -> bytes:
    """One to four changes, of bytes or of whole rows."""
    for _ in range(rng.randint(1, 4)):
        content = rng.choice(_CHANGES)(content, rng)
    return content


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    if changed:
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _insert(content: bytes, rng: random.Random) -> bytes:
    at = rng.randint(0, len(content))
    return content[:at] + rng.choice(_JUNK) * rng.choice((1, 1, 1, 50)) + content[at:]


def _delete(content: bytes, rng: random.Random) -> bytes:
    at = rng.randint(0, len(content))
    return content[:at] + content[at + rng.choice((1, 3, 40)) :]


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randint(0, len(content))]


def _encoding(content: bytes, rng: random.Random) -> bytes:
    text = content.decode("utf-8", "replace")
    return text.encode(
        rng.choice(("utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-8-sig")), "replace"
    )


def _row(content: bytes, rng: random.Random) -> bytes:
    lines = content.split(b"\n")
    lines.insert(rng.randint(0, len(lines)), rng.choice(_ROWS))
    return b"\n".join(lines)


_ROWS = (
    b'{"messages":' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    b'{"question": "' + b"x" * 300_000 + b'", "answer": "y"}',
    b'{"question": "a", "question": "b", "answer": "c"}',
    b'{"question": 5, "answer": ["x"]}',
    b'{"messages": [{"role": "root", "content": "x"}]}',
    b'{"messages": [{"role": "user", "content": {"a": null}}, 7]}',
    *(json.dumps({"question": text * 3, "answer": text}).encode() for text in CONTROL),
    b"-" * 20 + b'"' * 7,
    b"9" * 5000,
    b"",
)
_CHANGES = (_flip, _insert, _delete, _cut, _encoding, _row)


def mutations(bench: Bench, scale: Scale, originals: list[Path]) -> list[Row]:
    """Real files with a few changes: read, or refused row by row; nothing else."""
    row = Row(
        "data",
        "JSONL, JSON and CSV with one to four changes",
        "rows or a clear error, within 5 s, no traceback",
    )
    rng, before = random.Random(20_000), _peak_bytes()
    heads = [(path.suffix, b"\n".join(path.read_bytes().split(b"\n")[:25])) for path in originals]
    tokenizer = _tokenizer(bench.model)
    for number in range(scale.mutations):
        suffix, content = rng.choice(heads)
        path = bench.folder / f"mutated{rng.choice(SUFFIXES) if rng.random() < 0.05 else suffix}"
        path.write_bytes(mutated(content, rng))
        started = time.perf_counter()
        problem = None
        try:
            read_records(path, {})
            if number % 20 == 0:
                load_dataset(DataConfig(path=str(path), max_seq_length=64, skip_bad_rows=True), tokenizer, 0)
        except MlxQloraError:
            pass
        except BaseException as error:
            problem = f"mutation {number}: {type(error).__name__}: {error}"
        if time.perf_counter() - started > LIMIT_SECONDS:
            problem = f"mutation {number}: took {time.perf_counter() - started:.1f} s"
        row.note(problem)
        path.unlink()
    memory = Row("data", "the same: memory", "grows by less than 200 MiB over all of them")
    grown = (_peak_bytes() - before) / 1024**2
    memory.note(f"grew by {grown:.0f} MiB" if grown > 200 else None)
    return [row, memory]


def line_numbers(bench: Bench, scale: Scale) -> list[Row]:
    """A row that cannot be used is named by its line, wherever it stands."""
    row = Row("data", "one bad row at a known line", "named with that line, and no other is")
    rng = random.Random(1)
    bad = (
        '{"question": 5, "answer": "x"}',
        '{"question": "a"',
        "nonsense",
        '{"question": "", "answer": "x"}',
    )
    for number in range(min(scale.mutations, 500)):
        total, at = rng.randint(2, 60), 0
        at = rng.randint(2, total)  # the first row shows the schema
        lines = [
            json.dumps({"question": f"q {i}\u2028", "answer": "a"}, ensure_ascii=False) for i in range(total)
        ]
        lines[at - 1] = rng.choice(bad)
        path = bench.folder / "numbered.jsonl"
        path.write_bytes(rng.choice(("\n", "\r\n")).join(lines).encode())
        _, said = read_records(path, {})
        is_right = len(said) == 1 and said[0].startswith(f"numbered.jsonl:{at}:")
        row.note(None if is_right else f"trial {number}: line {at} of {total}: {said[:3]}")
    return [row]


def control_tokens(bench: Bench, _scale: Scale) -> list[Row]:
    """Special tokens that somebody typed are text."""
    row = Row("data", "control tokens typed by a user", "encoded as text: never a control token's id")
    tokenizer = _tokenizer(bench.model)
    ids = set(tokenizer.all_special_ids)
    clean = _contents(bench, tokenizer, "limpo")
    for text in (*tokenizer.all_special_tokens, *CONTROL):
        for typed in (text, f"a{text}b", f"{text}\n{text}", text * 20):
            tokens = _contents(bench, tokenizer, typed)
            controls = [token for token in tokens if token in ids]
            expected = [token for token in clean if token in ids]
            row.note(
                None if controls == expected else f"{typed!r} gave control tokens {controls}, not {expected}"
            )
    return [row]


def _contents(bench: Bench, tokenizer: object, text: str) -> list[int]:
    path = bench.folder / "typed.jsonl"
    path.write_text(json.dumps({"question": text, "answer": text}) + "\n", encoding="utf-8")
    config = DataConfig(path=str(path), max_seq_length=4096, valid_fraction=0)
    return load_dataset(config, tokenizer, 0).train[0].tokens.tolist()


def configurations(_bench: Bench, scale: Scale) -> list[Row]:
    """Trees of keys with values of any kind: a configuration, or all that is wrong with it at once."""
    row = Row("config", "keys with values of any kind", "a valid configuration or a clear error")
    rng = random.Random(7)
    keys = _leaves(build_config({}).model_dump())
    for number in range(scale.mutations):
        tree: dict[str, object] = {}
        for _ in range(rng.randint(1, 4)):
            path = list(rng.choice(keys))
            if rng.random() < 0.1:
                path[-1] += rng.choice(("x", "", "\u0000", "é"))
            node = tree
            for part in path[:-1]:
                inner = node.setdefault(part, {})
                node = inner if isinstance(inner, dict) else {}
            node[path[-1]] = rng.choice(_VALUES)
        try:
            build_config(tree)
            row.note(None)
        except MlxQloraError:
            row.note(None)
        except Exception as error:
            row.note(f"trial {number}: {tree}: {type(error).__name__}: {error}")
    return [row]


_VALUES = (
    None,
    True,
    -1,
    0,
    1,
    2**63,
    10**400,
    0.5,
    -0.0,
    1e-300,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "int4",
    "nf4",
    "../..",
    "\ud800",
    "x" * 10_000,
    [],
    [[]],
    ["q_proj", 3],
    {},
    {"a": {"b": 1}},
    {"*": "int8"},
    b"bytes",
    object(),
)


def _leaves(tree: dict[str, object], at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in tree.items():
        found.append((*at, key))
        if isinstance(value, dict):
            found += _leaves(value, (*at, key))
    return found


def real_files(project: Path) -> Iterator[Path]:
    """Data sets of the material folder, and the demo's own."""
    yield from sorted((project / "data" / "demo" / "club").glob("*.jsonl"))
    material = project.parent / "shared" / "material" / "datasets"
    for path in sorted(material.rglob("*")):
        if path.suffix in (".jsonl", ".csv", ".json") and path.stat().st_size < 5_000_000:
            yield path


def _tokenizer(model: Path) -> object:
    from mlx_lm.utils import load_tokenizer

    return load_tokenizer(model)


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
