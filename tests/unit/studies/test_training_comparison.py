"""studies/training_comparison.py, training_table.py, training_figure.py: what is made of figures."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest

from mlx_qlora.config import build_config
from mlx_qlora.errors import ConfigError, DataError, ModelError
from mlx_qlora.inference.comparison_worker import Measured
from mlx_qlora.storage import write_json
from mlx_qlora.studies import training_comparison as study
from mlx_qlora.studies.training_comparison import Request, Row, TrainingComparison, read_comparison
from mlx_qlora.studies.training_figure import save_figure
from mlx_qlora.studies.training_runs import TrainedVariant, TrainingFigures
from mlx_qlora.studies.training_table import legend, tables
from mlx_qlora.studies.training_worker import BaseFigures

MIB = 1024**2
BASE = BaseFigures(
    folder="copy", stored_as="bfloat16", dtype="float32", num_parameters=7_240_000_000,
    bytes_on_disk=13_812 * MIB, bytes_in_memory=13_812 * MIB,
)  # fmt: skip
TRAINING = TrainingFigures(
    num_steps=400, tokens=100_000, seconds=1234.5, seconds_per_step=3.0, tokens_per_second=81.0,
    peak_footprint_bytes=15_000 * MIB, mlx_peak_bytes=14_000 * MIB, trainable_parameters=3_407_872,
    adapter_bytes=13 * MIB, train_loss_nats=1.25, val_loss_nats=1.5, best_step=200,
    curve=((0, 2.0), (200, 1.5), (400, 1.6)), was_resumed=False,
)  # fmt: skip
ANSWERS = Measured(
    load_seconds=1.0, tokens_per_second=20.0, peak_footprint_bytes=14_500 * MIB, mlx_peak_bytes=14_000 * MIB,
    loss_nats=1.75, divergence_nats=0.0, agreement=1.0, target_tokens=50, split="test", num_rows=5,
    exact_match=0.5, num_questions=4, dtype="float32",
)  # fmt: skip


def variant(seed=0, repeat=1, answers=ANSWERS, **figures):
    """A run as if it had been measured: for what is made of figures, not for figures."""
    return TrainedVariant(
        seed=seed, repeat=repeat, folder=f"run-{seed}", training=replace(TRAINING, **figures), answers=answers
    )


def found(*rows, seeds=(0,), repeat=1):
    return TrainingComparison(
        model="mistralai/Mistral-7B-v0.1", data="data/farense", seeds=seeds, repeat=repeat, digest="d",
        rows=rows, environment={"device": "cpu"},
    )  # fmt: skip


def row(scheme, *runs, **keys):
    return Row(scheme=scheme, base=BASE, runs=runs, **keys)


def printed(comparison):
    """The tables as the command prints them, and the legend."""
    lines = []
    for title, columns, rows in tables(comparison):
        widths = [max(len(line[place]) for line in [columns, *rows]) for place in range(len(columns))]
        lines += [title, *("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows)]
    return lines, list(legend(comparison))


def test_tables_of_a_large_model_with_several_seeds_are_eighty_columns_wide_at_most():
    runs = [variant(seed, train_loss_nats=1.25 + seed / 10) for seed in (0, 1)]
    lines, _ = printed(found(row("none", *runs), row("nf4-dq-g64", *runs), seeds=(0, 1)))
    assert max(map(len, lines)) <= 80


def test_a_row_says_whether_the_base_was_quantized_and_what_storage_is_in_all():
    lines, _ = printed(found(row("none", variant()), row("int4", variant())))
    lora, qlora = (line.split("  ") for line in lines[1:3])
    assert lora[0] == "LoRA bf16"
    assert qlora[0].strip() == "QLoRA int4"
    assert lines[1].rstrip().endswith("13,825")  # 13,812 of base and 13 of adapter


def test_several_seeds_give_a_mean_and_a_deviation_and_one_gives_neither():
    runs = [variant(train_loss_nats=1.0), variant(1, train_loss_nats=2.0)]
    lines, said = printed(found(row("none", *runs), seeds=(0, 1)))
    assert "1.5000 ±0.7071" in lines[-1]
    assert any("standard deviation" in line for line in said)
    lines, said = printed(found(row("none", variant())))
    assert "±" not in lines[-1]
    assert not any("deviation" in line for line in said)


def test_times_of_one_run_are_called_rough_and_so_are_those_that_scatter():
    assert any("one run each: rough" in line for line in legend(found(row("none", variant()))))
    steady = [variant(repeat=n, seconds_per_step=3.0 + n / 100) for n in (1, 2)]
    said = list(legend(found(row("none", *steady), repeat=2)))
    assert any("median of 2 runs" in line for line in said)
    assert not any("rough" in line for line in said)
    disturbed = [variant(seconds_per_step=3.0), variant(repeat=2, seconds_per_step=4.0)]
    assert any("by up to 29% among them: rough" in line for line in legend(found(row("none", *disturbed))))


def test_a_repeated_run_with_another_loss_is_told_and_one_with_the_same_is_not():
    same = found(row("int4", variant(), variant(repeat=2)), repeat=2)
    assert not any("apart" in line for line in legend(same))
    other = found(row("int4", variant(), variant(repeat=2, train_loss_nats=1.26)), repeat=2)
    assert any("QLoRA int4, seed 0: repeated" in line and "0.01 apart" in line for line in legend(other))


def test_what_failed_is_told_and_stands_in_no_table():
    failed = Row(scheme="nf4", problems=("This run needs about 9 GiB.",))
    lines, said = printed(found(row("int4", variant()), failed))
    assert "QLoRA nf4: This run needs about 9 GiB." in said
    assert not any("nf4" in line for line in lines)
    assert printed(found(failed)) == ([], ["QLoRA nf4: This run needs about 9 GiB."])


def test_rows_that_were_trained_on_are_said_to_be():
    run = variant(answers=replace(ANSWERS, split="train"))
    assert any("rows they were trained on" in line for line in legend(found(row("none", run))))
    assert not any("trained on" in line for line in legend(found(row("none", variant()))))


def test_a_comparison_is_read_back_as_it_was(tmp_path):
    before = found(
        row("none", variant()), row("int4", variant(answers=None, val_loss_nats=None), problems=("why",)),
        Row(scheme="int2", problems=("does not fit",)),
    )  # fmt: skip
    write_json(tmp_path / "found.json", before.as_dict())
    assert read_comparison(tmp_path / "found.json") == before
    for broken in ("", "{}", '{"rows": [{}]}'):
        (tmp_path / "found.json").write_text(broken)
        with pytest.raises(ConfigError, match="no comparison of training runs"):
            read_comparison(tmp_path / "found.json")


def test_a_figure_is_drawn_of_any_rows_that_ran(tmp_path):
    pytest.importorskip("matplotlib")
    without = variant(answers=None, val_loss_nats=None, curve=())
    rows = [row("none", without), row("int4", without), Row(scheme="int2", problems=("why",))]
    assert save_figure(found(*rows), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert not save_figure(found(rows[-1]), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.fixture
def request_of(tiny_llama_folder, tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"prompt": "quem?", "completion": "o clube"}) + "\n")

    def make(*schemes, tree=None, **keys):
        paths = {"model": {"path": str(tiny_llama_folder)}, "data": {"path": str(tmp_path)}}
        return Request(config=build_config(paths, tree or {}), schemes=schemes, **keys)

    return make


def test_each_scheme_has_the_same_configuration_but_for_its_format(request_of):
    tree = {"quantization": {"scheme": "int3", "bits": 3, "overrides": {"v_proj": "int8"}}}
    configs = study._configs(request_of("fp16", "int8", "int4-g32", tree=tree))
    assert configs["fp16"].quantization.scheme == "none"
    assert configs["fp16"].quantization.overrides == ()
    narrow = configs["int4-g32"].quantization
    assert (narrow.scheme, narrow.group_size) == ("int4", 32)
    assert configs["int8"].quantization.bits is None
    assert configs["int8"].quantization.overrides == (("v_proj", "int8"),)
    trees = [config.model_dump(exclude={"quantization"}) for config in configs.values()]
    assert trees == [trees[0]] * 3


def test_all_schemes_that_do_not_exist_are_named_before_anything_is_trained(request_of, tmp_path):
    with pytest.raises(ConfigError, match="2 scheme") as caught:
        study.compare_training(request_of("int7", "int4", "nf5"), tmp_path / "out")
    assert "int7" in caught.value.what
    assert "nf5" in caught.value.what
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tree", "kind", "said"),
    [
        ({"quantization": {"bits_per_weight": 5}}, ConfigError, "bits_per_weight"),
        ({"data": {"path": "no/such.jsonl"}}, DataError, "no such file"),
        ({"model": {"path": None}}, ConfigError, "no model"),
    ],
)
def test_what_no_run_could_do_is_refused_at_once(request_of, tmp_path, tree, kind, said):
    with pytest.raises(kind, match=said):
        study.compare_training(request_of("int4", tree=tree), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_is_refused(request_of, tiny_llama_folder, tmp_path):
    import mlx_qlora as mq

    mq.quantize(str(tiny_llama_folder), tmp_path / "int8", "int8")
    with pytest.raises(ModelError, match="quantized already"):
        study.compare_training(request_of("int4", tree={"model": {"path": str(tmp_path / "int8")}}), tmp_path)


def test_the_digest_is_of_what_figures_depend_on(request_of, tmp_path):
    first = study._digest(request_of("int4"))
    other_seed = {"quantization": {"scheme": "int8"}, "training": {"seed": 7}}
    same = [
        request_of("int8"),
        request_of("int4", seeds=(1, 2), repeat=3),
        request_of("int4", tree=other_seed),
    ]
    assert {study._digest(request) for request in same} == {first}
    others = [request_of("int4", tree={"training": {"learning_rate": 1e-3}}), request_of("int4", max_rows=3),
              request_of("int4", tree={"quantization": {"keep_lm_head": True}})]  # fmt: skip
    digests = [first, *map(study._digest, others)]
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "onde?", "completion": "o clube"}) + "\n")
    digests.append(study._digest(request_of("int4")))
    assert len(set(digests)) == len(digests)


def test_every_run_has_a_folder_of_its_own():
    names = [study._folder_name(scheme, seed, repeat, digest * 8) for scheme in ("int4", "int4-g32")
             for seed in (0, 1, 11) for repeat in (1, 2) for digest in "ab"]  # fmt: skip
    assert all(one != other for one, other in pairwise(sorted(names)))
