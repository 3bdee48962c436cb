"""dataset/partition.py"""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_qlora.config import DataConfig, TrainingConfig
from mlx_qlora.dataset.check_report import check_data
from mlx_qlora.dataset.partition import Shares, split_data
from mlx_qlora.errors import ConfigError, DataError, StorageError

quick = settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))


def pairs(*numbers: int, answer: str = "Foi o time {}.") -> list[dict]:
    return [{"question": f"Quem venceu a partida {n}?", "answer": answer.format(n)} for n in numbers]


def saved(folder: Path, rows: list, name: str = "rows.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def split(
    path: Path, output: Path, valid: float = 0.1, test: float = 0.1, seed: int = 0, **how: object
) -> dict:
    split_data(str(path), output, Shares(valid, test, seed), **how)
    return {
        file.stem: [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for file in sorted(output.iterdir())
    }


def rows_of(splits: dict) -> list[dict]:
    return [row for rows in splits.values() for row in rows]


def places(splits: dict) -> dict[str, str]:
    return {json.dumps(row): name for name, rows in splits.items() for row in rows}


def test_every_row_is_in_one_of_three_files_unchanged_and_about_as_many_as_asked_for(tmp_path):
    rows = [{**row, "extra": {"n": [1]}} for row in pairs(*range(1000))]
    splits = split(saved(tmp_path, rows), tmp_path / "out")
    assert sorted(map(json.dumps, rows_of(splits))) == sorted(map(json.dumps, rows))
    assert 60 < len(splits["valid"]) < 140
    assert 60 < len(splits["test"]) < 140


def test_the_same_seed_is_the_same_split_and_another_is_another(tmp_path):
    path = saved(tmp_path, pairs(*range(100)))
    first, again, other = (
        places(split(path, tmp_path / str(n), seed=seed)) for n, seed in enumerate((3, 3, 4))
    )
    assert first == again
    assert first != other


@quick
@given(
    old=st.sets(st.integers(0, 500), min_size=60, max_size=90),
    new=st.sets(st.integers(501, 999), max_size=60),
    order=st.randoms(use_true_random=False),
)
def test_rows_stay_where_they_were_when_others_are_added_in_any_order(tmp_path_factory, old, new, order):
    folder = tmp_path_factory.mktemp("split")
    rows = pairs(*old, *new)
    order.shuffle(rows)
    before = places(split(saved(folder, pairs(*old), "a.jsonl"), folder / "a", valid=0.3, test=0.2))
    after = places(split(saved(folder, rows, "b.jsonl"), folder / "b", valid=0.3, test=0.2))
    assert all(after[row] == place for row, place in before.items())


def test_one_question_is_never_on_two_sides_however_it_is_written(tmp_path):
    rows = []
    for n in range(60):
        asked = f"Quem não venceu a partida {n}?"
        rows += [
            {"question": q, "answer": f"time {n} {i}"}
            for i, q in enumerate((asked, asked.upper(), f" {asked}?!"))
        ]
        rows.append({"question": asked.replace("ã", "a"), "answer": f"time {n} 0"})
    path = saved(tmp_path, rows)
    splits = split(path, tmp_path / "out", valid=0.3, test=0.2)
    numbers = {
        name: {row["question"].strip("?! ").split()[-1] for row in rows} for name, rows in splits.items()
    }
    assert not numbers["train"] & numbers["valid"]
    assert not numbers["train"] & numbers["test"]
    assert not numbers["valid"] & numbers["test"]
    found = check_data(DataConfig(path=str(tmp_path / "out")), TrainingConfig())
    assert not [f for f in found.findings if f.code.startswith("leaked")]


def test_a_system_turn_does_not_part_one_question(tmp_path):
    rows = [
        {"messages": [*system, {"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": "a"}]}
        for n in range(80)
        for system in ([], [{"role": "system", "content": "S"}])
    ]
    splits = split(saved(tmp_path, rows), tmp_path / "out", valid=0.3, test=0.2)
    assert all(len(rows) % 2 == 0 for rows in splits.values())


def test_one_of_the_same_rows_is_kept_where_that_is_asked_for(tmp_path):
    rows = [
        *pairs(*range(50)),
        *pairs(*range(10)),
        *pairs(1, answer="FOI O TIME {}!"),
        *pairs(2, answer="Outro: {}"),
    ]
    path = saved(tmp_path, rows)
    assert len(rows_of(split(path, tmp_path / "all"))) == 62
    result = split_data(str(path), tmp_path / "one", Shares(), drop_duplicates=True)
    assert sum(result.rows.values()) == 51
    assert result.notes == ["11 duplicate row(s) were left out"]


def test_several_files_are_taken_together_and_a_table_becomes_rows_under_our_names(tmp_path):
    saved(tmp_path / "in", pairs(*range(40)), "train.jsonl")
    (tmp_path / "in" / "valid.csv").write_text(
        "question,answer\n" + "".join(f"Quem {n}?,eu\n" for n in range(40)), encoding="utf-8"
    )
    result = split_data(str(tmp_path / "in"), tmp_path / "out", Shares())
    assert sum(result.rows.values()) == 80
    assert result.notes == ["train.jsonl, valid.csv were taken together"]
    (tmp_path / "a.csv").write_text("frage;antwort\n" + "".join(f"Wer {n}?;er\n" for n in range(40)))
    columns = {"question": "frage", "answer": "antwort"}
    splits = split(tmp_path / "a.csv", tmp_path / "named", columns=columns)
    assert all(row.keys() == columns.keys() for rows in splits.values() for row in rows)


def test_shares_of_nothing_write_no_file(tmp_path):
    assert split(saved(tmp_path, pairs(*range(30))), tmp_path / "out", test=0.0).keys() == {"train", "valid"}


@pytest.mark.parametrize(("valid", "test"), [(0.5, 0.5), (0.9, 0.2), (1.0, 0.0), (-0.1, 0.1)])
def test_shares_that_leave_nothing_to_train_on_are_refused(valid, test):
    with pytest.raises(ConfigError, match="leave nothing"):
        Shares(valid, test)


def test_a_split_that_would_be_empty_is_refused_with_a_seed_that_is_not(tmp_path):
    path = saved(tmp_path, pairs(*range(10)))
    empty = next(seed for seed in range(50) if _is_refused(path, tmp_path / f"seed{seed}", seed))
    with pytest.raises(DataError, match="would be empty") as caught:
        split(path, tmp_path / "out", seed=empty)
    assert not (tmp_path / "out").exists()
    words = str(caught.value).split()
    assert all(split(path, tmp_path / "out", seed=int(words[words.index("--seed") + 1])).values())


def _is_refused(path: Path, output: Path, seed: int) -> bool:
    try:
        split(path, output, seed=seed)
    except DataError:
        return True
    return False


def test_two_rows_cannot_be_three_files(tmp_path):
    with pytest.raises(DataError, match="2 rows ask 2 different questions"):
        split(saved(tmp_path, pairs(1, 2)), tmp_path / "out")


def test_nothing_is_overwritten(tmp_path):
    path = saved(tmp_path, pairs(*range(50)))
    split(path, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(StorageError, match="already"):
        split(path, tmp_path / "out", seed=9)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_bad_rows_are_told_and_left_out_only_where_that_is_asked_for(tmp_path):
    path = saved(tmp_path, [*pairs(*range(60)), "{broken", {"question": "a", "answer": ""}])
    with pytest.raises(DataError, match=r"rows\.jsonl:61"):
        split(path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl"]
    result = split_data(str(path), tmp_path / "out", Shares(), skip_bad_rows=True)
    assert sum(result.rows.values()) == 60
    assert len(result.bad) == 2


def test_real_data_that_leaks_is_split_so_that_it_does_not(material, tmp_path):
    source = material / "datasets" / "mlx-examples"
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_bytes((source / f"wwdc25_{name}.jsonl").read_bytes())

    def leaks(place: Path) -> list[str]:
        found = check_data(DataConfig(path=str(place)), TrainingConfig()).findings
        return [f.code for f in found if f.code.startswith("leaked")]

    assert leaks(tmp_path)
    result = split_data(str(tmp_path), tmp_path / "out", Shares(), drop_duplicates=True)
    assert sum(result.rows.values()) + result.dropped_duplicates == 1944
    assert leaks(tmp_path / "out") == []
