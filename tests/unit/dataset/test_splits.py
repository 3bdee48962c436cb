"""dataset/files.py, dataset/splits.py and dataset/report.py"""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_qlora.config import DataConfig
from mlx_qlora.dataset import Dataset, load_dataset
from mlx_qlora.dataset.encoding import inner_of
from mlx_qlora.dataset.splits import held_out
from mlx_qlora.errors import ConfigError, DataError
from tests.chat_tokenizers import shared_tokenizer, tokenizer_named
from tests.conftest import REPOSITORY

DEMO = REPOSITORY / "data" / "demo" / "club"


def pairs(*numbers: int, question: str = "Quanto é {}?", answer: str = "É {}.") -> list[dict[str, str]]:
    return [{"question": question.format(n), "answer": answer.format(n)} for n in numbers]


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def load(path: Path | str, *, seed: int = 0, name: str = "chatml", **config: object) -> Dataset:
    return load_dataset(DataConfig(path=str(path), **config), shared_tokenizer(name), seed)


def texts(examples: list, name: str = "chatml") -> list[str]:
    return [shared_tokenizer(name).decode(example.tokens) for example in examples]


def sources(examples: list) -> list[str]:
    return [example.source for example in examples]


def test_a_folder_has_one_file_for_each_split(tmp_path):
    for name, numbers in (("train", range(5)), ("valid", range(5, 7)), ("test", range(7, 8))):
        write(tmp_path / f"{name}.jsonl", pairs(*numbers))
    dataset = load(tmp_path)
    assert [len(split) for split in (dataset.train, dataset.valid, dataset.test)] == [5, 2, 1]
    assert sources(dataset.valid) == ["valid.jsonl:1", "valid.jsonl:2"]
    assert texts(dataset.test) == [
        "<|im_start|>user\nQuanto é 7?<|im_end|>\n<|im_start|>assistant\nÉ 7.<|im_end|>\n"
    ]


@pytest.mark.parametrize("name", ["valid", "validation", "val", "dev"])
@pytest.mark.parametrize("below", ["", "data"])
def test_a_validation_file_is_known_by_any_of_its_names(tmp_path, name, below):
    write(tmp_path / below / "train.jsonl", pairs(1))
    write(tmp_path / below / f"{name}.jsonl", pairs(2))
    assert sources(load(tmp_path).valid) == [f"{name}.jsonl:1"]


def test_jsonl_csv_and_json_of_the_same_rows_are_the_same_data(tmp_path):
    rows = pairs(*range(20))
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    lines = ["question,answer", *(f'{row["question"]},"{row["answer"]}"' for row in rows)]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    jsonl, array, table = (load(tmp_path / f"a.{suffix}") for suffix in ("jsonl", "json", "csv"))
    assert texts(jsonl.train) == texts(array.train) == texts(table.train)
    assert texts(jsonl.valid) == texts(array.valid) == texts(table.valid)
    assert len(jsonl.train) == 18


def test_a_folder_with_a_single_file_of_any_name_is_the_data(tmp_path):
    write(tmp_path / "perguntas.jsonl", pairs(*range(10)))
    assert len(load(tmp_path).train) == 9


def test_without_a_validation_file_a_share_is_held_out_and_the_report_says_so(tmp_path):
    path = write(tmp_path / "t.jsonl", pairs(*range(40)))
    dataset = load(path, valid_fraction=0.25, seed=3)
    assert (len(dataset.train), len(dataset.valid), dataset.test) == (30, 10, [])
    assert Counter(texts(dataset.train) + texts(dataset.valid)) == Counter(
        texts(load(path, valid_fraction=0.0).train)
    )
    assert "no validation file: 10 rows were held out by seed 3" in dataset.report.notes
    assert load(path, valid_fraction=0.0).valid == []


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_rows(tmp_path):
    rows = pairs(*range(40))
    held = set(texts(load(write(tmp_path / "a.jsonl", rows)).valid))
    random.Random(1).shuffle(rows)
    assert set(texts(load(write(tmp_path / "b.jsonl", rows)).valid)) == held
    assert set(texts(load(tmp_path / "a.jsonl", seed=1).valid)) != held
    assert load(tmp_path / "a.jsonl").train[0].source == load(tmp_path / "a.jsonl").train[0].source


def test_equal_questions_with_different_answers_stay_on_one_side(tmp_path):
    """Neither a system turn nor spaces around it make another question."""
    system = {"role": "system", "content": "Seja breve."}
    rows = [
        {"messages": [*before, {"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for n in range(12)
        for before in ([], [system])
        for asked, answer in (
            (f"Quem é {n}?", "Um."),
            (f" Quem é {n}?", "Dois."),
            (f"Quem é {n}?\n", "Três."),
        )
    ]
    dataset = load(write(tmp_path / "t.jsonl", rows), valid_fraction=0.3)
    train, valid = (
        {text.split("user\n")[1].split("<")[0].strip() for text in texts(split)}
        for split in (dataset.train, dataset.valid)
    )
    assert train | valid == {f"Quem é {n}?" for n in range(12)}
    assert not train & valid
    assert not dataset.report.leaked


PROMPTS = st.lists(st.integers(0, 12).map(lambda n: bytes([n])), max_size=40)


@given(prompts=PROMPTS, fraction=st.floats(0.01, 0.99), seed=st.integers(0, 99), shuffle=st.integers(0, 99))
def test_held_out_rows_are_whole_groups_never_none_never_all_in_any_order(prompts, fraction, seed, shuffle):
    held = held_out(prompts, fraction, seed)
    inside, outside = ({prompts[i] for i in side} for side in (held, set(range(len(prompts))) - held))
    assert not inside & outside
    if len(set(prompts)) > 1:
        assert inside
        assert outside
    else:
        assert not inside
    order = list(range(len(prompts)))
    random.Random(shuffle).shuffle(order)
    assert {prompts[order[i]] for i in held_out([prompts[i] for i in order], fraction, seed)} == inside


@pytest.mark.parametrize("seed", range(4))
def test_where_every_group_is_larger_than_the_share_a_smallest_one_is_held_out_in_any_order(seed):
    prompts = [b"a"] * 4 + [b"b"] * 3 + [b"c"] * 3
    held = {prompts[i] for i in held_out(prompts, 0.1, seed)}
    assert held in ({b"b"}, {b"c"})
    assert {prompts[::-1][i] for i in held_out(prompts[::-1], 0.1, seed)} == held


@settings(max_examples=20)
@given(count=st.integers(2, 300), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_of_distinct_prompts_exactly_the_share_is_held_out(count, fraction, seed):
    held = held_out([str(n).encode() for n in range(count)], fraction, seed)
    assert len(held) == min(max(1, round(count * fraction)), count - 1)


def test_a_single_row_is_trained_on_and_nothing_is_held_out(tmp_path):
    dataset = load(write(tmp_path / "t.jsonl", pairs(1)))
    assert (len(dataset.train), dataset.valid) == (1, [])


def test_duplicates_are_counted(tmp_path):
    write(tmp_path / "train.jsonl", pairs(1, 2, 1, 1, 3, 2))
    write(tmp_path / "valid.jsonl", pairs(7))
    report = load(tmp_path).report
    assert report.splits["train"].duplicates == 3
    assert report.splits["valid"].duplicates == 0
    assert "train: 3 rows duplicates of another row" in report.lines()


def test_rows_of_valid_and_test_that_stand_in_train_are_named(tmp_path):
    write(tmp_path / "train.jsonl", pairs(*range(6)))
    write(tmp_path / "valid.jsonl", [*pairs(10), *pairs(3), *pairs(4, answer="Outra.")])
    write(tmp_path / "test.jsonl", pairs(11, 0))
    report = load(tmp_path).report
    assert report.leaked == ["valid.jsonl:2", "valid.jsonl:3", "test.jsonl:2"]
    (line,) = [line for line in report.lines() if "in train" in line]
    assert line.startswith("warning: 3 rows")
    assert line.endswith("valid.jsonl:2, valid.jsonl:3, test.jsonl:2")


def test_text_that_stands_in_train_too_is_a_leak(tmp_path):
    write(tmp_path / "train.jsonl", [{"text": "a b"}, {"text": "c d"}])
    write(tmp_path / "valid.jsonl", [{"text": "c d"}, {"text": "e f"}])
    assert load(tmp_path).report.leaked == ["valid.jsonl:1"]


def test_rows_that_differ_only_behind_the_cut_are_a_leak(tmp_path):
    write(tmp_path / "train.jsonl", [{"text": "gol " * 100 + "um"}])
    write(tmp_path / "valid.jsonl", [{"text": "gol " * 100 + "dois"}])
    assert load(tmp_path, max_seq_length=64).report.leaked == ["valid.jsonl:1"]
    assert load(tmp_path, max_seq_length=4096).report.leaked == []


LONG = {"question": "Conte.", "answer": "gol " * 200}


@pytest.mark.parametrize("name", ["chatml", "llama3", "demo", "mistral-v1"])
def test_a_row_that_is_too_long_is_cut_and_still_ends_in_eos_as_a_target(tmp_path, name):
    write(tmp_path / "train.jsonl", [*pairs(1), LONG, *pairs(2)])
    write(tmp_path / "valid.jsonl", pairs(3))
    whole = load(tmp_path, name=name, max_seq_length=4096)
    dataset = load(tmp_path, name=name, max_seq_length=64)
    short, long, other = dataset.train
    assert len(long.tokens) == 64
    assert long.tokens[-1] == inner_of(shared_tokenizer(name)).eos_token_id
    assert long.targets_mask[-1]
    assert long.tokens[:-1].tolist() == whole.train[1].tokens[:63].tolist()
    assert long.targets_mask[:-1].tolist() == whole.train[1].targets_mask[:63].tolist()
    assert short.tokens.tolist() == whole.train[0].tokens.tolist()
    assert other.tokens.tolist() == whole.train[2].tokens.tolist()
    assert dataset.report.splits["train"].truncated == 1
    assert whole.report.splits["train"].truncated == 0
    assert "train: 1 row cut to max_seq_length" in dataset.report.lines()


def test_a_row_that_is_too_long_is_dropped_if_asked_and_counted(tmp_path):
    write(tmp_path / "train.jsonl", [*pairs(1), LONG, *pairs(2)])
    write(tmp_path / "valid.jsonl", pairs(3))
    dataset = load(tmp_path, max_seq_length=64, truncation="drop")
    assert sources(dataset.train) == ["train.jsonl:1", "train.jsonl:3"]
    assert (dataset.report.splits["train"].dropped, dataset.report.splits["train"].truncated) == (1, 0)
    assert "train: 1 row longer than max_seq_length and dropped" in dataset.report.lines()


def test_a_prompt_that_fills_the_window_is_a_bad_row_that_tells_both_lengths(tmp_path):
    row = {"question": "gol " * 100, "answer": "Sim."}
    path = write(tmp_path / "t.jsonl", [*pairs(1), row, *pairs(2)])
    with pytest.raises(
        DataError, match=r"t\.jsonl:2: its prompt fills the window of 64 tokens \(the row has \d{3}\)"
    ):
        load(path, max_seq_length=64)
    dataset = load(path, max_seq_length=64, skip_bad_rows=True)
    assert len(dataset.train) + len(dataset.valid) == 2
    assert "train: 1 row unusable and left out" in dataset.report.lines()


def test_all_bad_rows_of_all_files_are_told_at_once_the_first_twenty_by_line(tmp_path):
    write(tmp_path / "train.jsonl", [*pairs(1), *["{"] * 19])
    write(tmp_path / "valid.jsonl", [*pairs(2), *["{"] * 6])
    with pytest.raises(DataError) as error:
        load(tmp_path)
    said = str(error.value)
    assert said.startswith("25 row(s) cannot be used")
    assert [f"train.jsonl:{line}: " in said for line in (1, 2, 20)] == [False, True, True]
    assert [f"valid.jsonl:{line}: " in said for line in (1, 2, 3)] == [False, True, False]
    assert "… and 5 more" in said
    assert "--skip-bad-rows" in error.value.run


def test_bad_rows_are_left_out_and_counted_if_asked(tmp_path):
    path = write(tmp_path / "t.jsonl", [*pairs(1), "{", *pairs(2), "7", *pairs(3)])
    dataset = load(path, skip_bad_rows=True, valid_fraction=0.0)
    assert sources(dataset.train) == ["t.jsonl:1", "t.jsonl:3", "t.jsonl:5"]
    assert [line.split(": ")[0] for line in dataset.report.splits["train"].bad] == ["t.jsonl:2", "t.jsonl:4"]


@pytest.mark.parametrize("rows", [[], [""], ["", " "]])
def test_data_without_rows_is_an_error_that_names_it(tmp_path, rows):
    path = write(tmp_path / "empty.jsonl", rows)
    with pytest.raises(DataError, match=r"(?s)no row to train on.*empty\.jsonl"):
        load(path)


def test_data_of_which_nothing_is_left_is_an_error(tmp_path):
    path = write(tmp_path / "t.jsonl", ["{", "7"])
    with pytest.raises(DataError):
        load(path, skip_bad_rows=True)
    with pytest.raises(DataError, match="no row to train on"):
        load(write(tmp_path / "u.jsonl", [LONG]), max_seq_length=32, truncation="drop")


@pytest.mark.parametrize(
    "place", ["nowhere.jsonl", "./nowhere", "/nowhere/at/all", "a/b/c", "nowhere", "~/nowhere.csv"]
)
def test_a_place_that_is_not_there_is_named(place):
    with pytest.raises(DataError, match="no such file or folder") as error:
        load(place)
    assert error.value.where == place


def test_a_folder_without_data_says_what_is_there(tmp_path):
    (tmp_path / "leia.txt").write_text("")
    with pytest.raises(DataError, match=r"leia\.txt"):
        load(tmp_path)
    with pytest.raises(DataError, match=r"\.jsonl, \.csv, \.json"):
        load(tmp_path / "leia.txt")
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there is nothing"):
        load(empty)


def test_no_place_at_all_is_a_configuration_error():
    with pytest.raises(ConfigError, match="no data"):
        load_dataset(DataConfig(), shared_tokenizer("chatml"), 0)


def test_a_data_set_on_the_hub_that_is_not_cached_says_how_to_get_it(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="hub cannot be reached") as error:
        load("ninguem/dados-que-nao-ha")
    assert error.value.run.startswith("hf download ninguem/dados-que-nao-ha --repo-type dataset")


def test_columns_are_renamed_and_wrong_names_are_refused(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"pergunta": str(n), "resposta": "a"} for n in range(5)])
    renamed = {"question": "pergunta", "answer": "resposta"}
    assert len(load(path, columns=renamed).train) == 4
    with pytest.raises(ConfigError, match="perguntas.*there are messages, prompt"):
        load(path, columns={"perguntas": "pergunta", "answer": "resposta"})
    with pytest.raises(DataError, match=r"(?s)instruction: tarefa.*'pergunta', 'resposta'"):
        load(path, columns={**renamed, "instruction": "tarefa"})
    with pytest.raises(DataError, match="respostas"):
        load(path, columns={**renamed, "answer": "respostas"})


def test_a_template_that_cannot_be_masked_says_how_to_go_on(tmp_path):
    from mlx_qlora.dataset import ensure_chat_template

    tokenizer = tokenizer_named("chatml")
    ensure_chat_template(tokenizer, "{{ messages|length }}" + tokenizer.chat_template)
    path = write(tmp_path / "t.jsonl", pairs(1, 2, 3))
    with pytest.raises(DataError, match="cannot be masked") as error:
        load_dataset(DataConfig(path=str(path), skip_bad_rows=True), tokenizer, 0)
    assert "data.loss_on=all" in error.value.run
    assert load_dataset(DataConfig(path=str(path), loss_on="all"), tokenizer, 0).train


def test_the_report_reads_well(tmp_path):
    write(tmp_path / "train.jsonl", [*pairs(1, 1, 2), "{", LONG])
    write(tmp_path / "valid.jsonl", pairs(2))
    dataset = load(tmp_path, skip_bad_rows=True, max_seq_length=64)
    lengths = sorted(len(example.tokens) for example in dataset.train)
    tokens = sum(lengths)
    targets = sum(int(example.targets_mask.sum()) for example in dataset.train)
    lines = dataset.report.lines()
    assert lines[0].startswith(f"train: 4 rows, {tokens} tokens ({targets} targets); length ")
    assert lines[0].endswith(f"{lengths[-1]} at most")
    assert lines[1:4] == [
        "train: 1 row unusable and left out",
        "train: 1 row cut to max_seq_length",
        "train: 1 row duplicates of another row",
    ]
    assert lines[4].startswith("  train.jsonl:4: it is not JSON")
    assert lines[5].startswith("valid: 1 row, ")
    assert lines[6].startswith("warning: 1 row of valid or test")
    assert lines[6].endswith("in train: valid.jsonl:1")
    assert len(lines) == 7


def test_the_default_template_is_noted_and_an_own_one_is_not(tmp_path):
    path = write(tmp_path / "t.jsonl", pairs(1, 2, 3))
    config = DataConfig(path=str(path), valid_fraction=0.0)
    tokenizer = tokenizer_named("chatml")
    assert load_dataset(config, tokenizer, 0).report.notes == []
    tokenizer.chat_template = None
    (note,) = load_dataset(config, tokenizer, 0).report.notes
    assert "no chat template" in note


def test_answers_that_never_end_in_a_stop_token_are_warned_about(tmp_path):
    tokenizer = tokenizer_named("chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    path = write(tmp_path / "t.jsonl", pairs(1, 2, 3))
    notes = load_dataset(DataConfig(path=str(path)), tokenizer, 0).report.notes
    assert any("3 answers do not end in a token at which generation stops" in note for note in notes)


def test_progress_grows_from_file_to_file_up_to_the_whole(tmp_path):
    for name in ("train", "valid"):
        write(tmp_path / f"{name}.jsonl", pairs(*range(5)))
    seen: list[tuple[int, int]] = []
    config = DataConfig(path=str(tmp_path))
    load_dataset(config, shared_tokenizer("chatml"), 0, lambda done, total: seen.append((done, total)))
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total, total)
    assert len(seen) == 10


def test_masks_never_ask_for_the_first_token_and_fit_the_tokens(tmp_path):
    dataset = load(write(tmp_path / "t.jsonl", [{"text": f"gol {n}"} for n in range(5)]))
    for example in dataset.train + dataset.valid:
        assert example.tokens.dtype.name == "int32"
        assert example.targets_mask.tolist() == [False] + [True] * (len(example.tokens) - 1)


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_demo_data_is_clean(wrapped):
    dataset = load_dataset(DataConfig(path=str(DEMO)), shared_tokenizer("demo", wrapped=wrapped), 0)
    assert all(not split.bad and not split.truncated for split in dataset.report.splits.values())
    assert dataset.train
    assert dataset.valid
    assert dataset.test
