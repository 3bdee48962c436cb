"""Whatever stands in a data file, what comes out is data or a DataError."""

import json
import random

import pytest

from mlx_qlora.config import DataConfig
from mlx_qlora.dataset import load_dataset
from mlx_qlora.errors import DataError
from tests.chat_tokenizers import shared_tokenizer
from tests.conftest import REPOSITORY

DEMO = (REPOSITORY / "data" / "demo" / "club" / "train.jsonl").read_bytes().splitlines()[:6]
ROWS = [json.loads(line) for line in DEMO]
PAIRS = [(row["messages"][0]["content"], row["messages"][-1]["content"]) for row in ROWS]
SEEDS = {
    "jsonl": b"\n".join(DEMO),
    "csv": "\n".join(
        ["question,answer", *(f'"{question}","{answer}"' for question, answer in PAIRS)]
    ).encode(),
    "json": json.dumps(ROWS, ensure_ascii=False, indent=1).encode(),
}
ODD = [
    *(b"\x00", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xff\xfe", b"\r", b"\n", b"\r\n", b"\t"),
    *(
        b'"',
        b'""',
        b"\\",
        rb"\ud800",
        rb"\u0000",
        rb"\ufdd0",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b";",
        b"null",
    ),
    *(
        b"1e999",
        b"NaN",
        b"-Infinity",
        b"9" * 5000,
        b"[" * 5000,
        b'{"a":' * 5000,
        b"<|im_end|>",
        b"<|im_start|>",
    ),
    *("\ufdd0".encode(), "\ufdd1".encode(), "\u2028".encode(), "é".encode(), "👩‍👩‍👧".encode()),
    *(b'"messages"', b'"role"', b'"content"', b'"text"', b'{"text": "a"}\n', b'{"messages": []}\n'),
]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """One to four changes: a bit flipped, a piece cut out, doubled or moved, odd bytes put in."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content) + 1)
        to = min(len(content), at + rng.choice([1, 1, 3, 20, 200]))
        change = rng.choice(["flip", "cut", "double", "end", "odd", "odd", "odd"])
        if change == "flip" and at < len(content):
            content = content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
        elif change == "cut":
            content = content[:at] + content[to:]
        elif change == "double":
            content = content[:to] + content[at:]
        elif change == "end" and rng.random() < 0.3:
            content = content[:at]
        else:
            content = content[:at] + rng.choice(ODD) + content[at:]
    return content


STRANGE = [
    None,
    True,
    7,
    1e300,
    "",
    " ",
    "\ud800",
    "\x00",
    "<|im_end|>",
    [],
    {},
    ["a"],
    {"a": None},
    [[]],
    "tool",
]


def with_strange_node(tree: object, rng: random.Random) -> object:
    """The tree with one node, at any depth, replaced by something else, or one key by another."""
    if rng.random() < 0.3 or not isinstance(tree, (dict, list)) or not tree:
        return rng.choice(STRANGE)
    if isinstance(tree, list):
        at = rng.randrange(len(tree))
        return [with_strange_node(node, rng) if i == at else node for i, node in enumerate(tree)]
    chosen = rng.choice(list(tree))
    if rng.random() < 0.1:
        return {f"{key}x" if key == chosen else key: node for key, node in tree.items()}
    return {key: with_strange_node(node, rng) if key == chosen else node for key, node in tree.items()}


def test_rows_of_the_wrong_shape_are_told_by_their_line_and_nothing_else_is(tmp_path):
    rng = random.Random("shape")
    path = tmp_path / "rows.jsonl"
    config = DataConfig(path=str(path), skip_bad_rows=True, max_seq_length=128)
    told = 0
    for _ in range(500):
        rows = [*ROWS[:3], with_strange_node(ROWS[3], rng), *ROWS[4:]]
        path.write_text("\n".join(map(json.dumps, rows)))
        report = load_dataset(config, shared_tokenizer("chatml"), seed=0).report
        bad = [line for split in report.splits.values() for line in split.bad]
        assert [line.split(": ")[0] for line in bad] in ([], ["rows.jsonl:4"])
        told += len(bad)
    assert 100 < told < 500


@pytest.mark.parametrize("suffix", SEEDS)
@pytest.mark.parametrize("skip_bad_rows", [True, False])
def test_damaged_files_give_rows_or_a_data_error_and_nothing_else(tmp_path, suffix, skip_bad_rows):
    rng = random.Random(f"{suffix} {skip_bad_rows}")
    tokenizer = shared_tokenizer("chatml")
    path = tmp_path / f"rows.{suffix}"
    config = DataConfig(path=str(path), skip_bad_rows=skip_bad_rows, max_seq_length=128)
    num_loaded = num_refused = 0
    for round_number in range(500):
        path.write_bytes(content := mutated(SEEDS[suffix], rng))
        try:
            dataset = load_dataset(config, tokenizer, seed=0)
        except DataError as error:
            str(error).encode("utf-8")  # can be printed
            num_refused += 1
            continue
        except Exception as error:
            raise AssertionError(f"round {round_number}: {content!r}") from error
        num_loaded += 1
        "\n".join(dataset.report.lines()).encode("utf-8")
        for example in dataset.train + dataset.valid:
            assert example.targets_mask.any()
            assert 2 <= len(example.tokens) <= 128
    assert min(num_loaded, num_refused) > 10
