"""config.py, presets.py, errors.py"""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mlx_qlora import presets
from mlx_qlora.config import (
    LoraConfig,
    RunConfig,
    TrainingConfig,
    build_config,
    difference,
    merge_trees,
    parse_assignment,
    read_config,
    to_yaml,
)
from mlx_qlora.errors import ConfigError, Interrupted, MlxQloraError, listed
from mlx_qlora.presets import GIB, PRESETS, name_for, preset

keys = st.text("abcxyz_", min_size=1, max_size=6)
leaves = st.one_of(st.integers(), st.booleans(), st.none(), st.text("ab", max_size=3))
trees = st.recursive(
    st.dictionaries(keys, leaves, max_size=3), lambda tree: st.dictionaries(keys, leaves | tree, max_size=3)
)
letters = st.characters(codec="utf-8", exclude_characters="\x85")
run_configs = st.builds(
    lambda rank, alpha, modules, rate, clip, prompt: build_config(
        {
            "lora": {"rank": rank, "alpha": alpha, "target_modules": modules},
            "training": {"learning_rate": rate, "max_grad_norm": clip},
            "data": {"system_prompt": prompt, "columns": {"question": "pergunta"}},
        }
    ),
    rank=st.integers(1, 512),
    alpha=st.floats(1e-3, 1e3),
    modules=st.lists(st.text(letters, min_size=1, max_size=8), min_size=1, max_size=3),
    rate=st.floats(1e-9, 1),
    clip=st.none() | st.floats(1e-3, 1e3),
    prompt=st.none() | st.text(letters, max_size=20),
)


# ---------------------------------------------------------------- config: what is refused, and how it is said


def test_an_unknown_key_is_refused_with_the_keys_there_are():
    with pytest.raises(ConfigError) as refused:
        build_config({"lora": {"ranks": 4}})
    assert "lora.ranks: no such key; there are rank, alpha, dropout, target_modules" in str(refused.value)


def test_an_unknown_section_is_refused_with_the_sections_there_are():
    with pytest.raises(
        ConfigError, match=r"loar: no such key; there are model, quantization, lora, data, training"
    ):
        build_config({"loar": {}})


def test_all_problems_are_said_at_once_with_the_place_and_the_next_command():
    with pytest.raises(ConfigError) as refused:
        build_config(
            {
                "lora": {"rank": 0},
                "training": {"lr": 1, "optimizer": "adagrad"},
                "data": {"max_seq_length": "x"},
            },
            where="run.yaml",
        )
    said = str(refused.value)
    assert "4 problem(s)" in said
    assert all(
        key in said for key in ("lora.rank:", "training.lr:", "training.optimizer:", "data.max_seq_length:")
    )
    assert refused.value.where == "run.yaml"
    assert refused.value.run.startswith("mlx-qlora presets --yaml")


@pytest.mark.parametrize(
    "assignment",
    [
        "lora.num_layers=0",
        "lora.num_layers=-2",
        "lora.dropout=1.0",
        "lora.bias=all",
        "lora.target_modules=[]",
        "data.max_seq_length=1",
        "data.valid_fraction=1.0",
        "training.batch_size=0",
        "training.warmup_steps=-1",
        "training.learning_rate=.nan",
        "training.learning_rate=.inf",
        "training.max_grad_norm=0",
        "training.seed=-1",
        "training=7",
    ],
)
def test_a_value_that_makes_no_run_is_refused_by_its_key(assignment):
    with pytest.raises(ConfigError) as refused:
        build_config(parse_assignment(assignment))
    assert assignment.partition("=")[0].split(".")[-1] in str(refused.value)


def test_a_configuration_cannot_be_changed_after_it_is_made():
    with pytest.raises(ValidationError, match="frozen"):
        LoraConfig().rank = 4


def test_every_key_has_a_description():
    for section in RunConfig.model_fields.values():
        for name, field in section.annotation.model_fields.items():
            assert field.description, name


# ---------------------------------------------------------------- config: trees


def test_a_later_tree_wins_key_by_key():
    config = build_config({"lora": {"rank": 4, "alpha": 4}}, {"lora": {"rank": 32}})
    assert (config.lora.rank, config.lora.alpha) == (32, 4)


def test_merging_replaces_a_list_and_a_value_by_a_tree_as_a_whole():
    assert merge_trees({"a": [1, 2], "b": 1}, {"a": [3], "b": {"c": 1}}) == {"a": [3], "b": {"c": 1}}


@given(trees, trees)
def test_merging_leaves_its_arguments_alone_and_the_second_wins(base, over):
    before = repr((base, over))
    merged = merge_trees(base, over)
    assert repr((base, over)) == before
    assert merge_trees(merged, over) == merged
    assert merged.keys() == base.keys() | over.keys()


@given(trees, trees, trees)
def test_merging_does_not_depend_on_what_is_merged_first(a, b, c):
    if all_leaves_agree(a, b, c):
        assert merge_trees(merge_trees(a, b), c) == merge_trees(a, merge_trees(b, c))


def all_leaves_agree(*many: dict) -> bool:
    """No key is a tree in one and a leaf in another: there, order matters."""
    kinds: dict[str, bool] = {}

    def agrees(tree: dict, prefix: str) -> bool:
        return all(
            kinds.setdefault(prefix + key, isinstance(value, dict)) == isinstance(value, dict)
            and (not isinstance(value, dict) or agrees(value, f"{prefix}{key}."))
            for key, value in tree.items()
        )

    return all(agrees(tree, "") for tree in many)


# ---------------------------------------------------------------- config: --set


@pytest.mark.parametrize(
    ("assignment", "tree"),
    [
        ("lora.rank=16", {"lora": {"rank": 16}}),
        ("lora.target_modules=[q_proj,v_proj]", {"lora": {"target_modules": ["q_proj", "v_proj"]}}),
        ("training.max_grad_norm=null", {"training": {"max_grad_norm": None}}),
        ("data.system_prompt=a = b", {"data": {"system_prompt": "a = b"}}),
        (" model.path =x", {"model": {"path": "x"}}),
        ("data.columns.question=pergunta", {"data": {"columns": {"question": "pergunta"}}}),
    ],
)
def test_an_assignment_becomes_a_tree_with_its_value_read_as_yaml(assignment, tree):
    assert parse_assignment(assignment) == tree


def test_a_rate_in_scientific_notation_is_a_number():
    config = build_config(parse_assignment("training.learning_rate=1e-4"))
    assert config.training.learning_rate == 1e-4


@pytest.mark.parametrize("assignment", ["lora.rank", "=3", " =3", ""])
def test_an_assignment_without_key_or_value_is_refused_with_an_example(assignment):
    with pytest.raises(ConfigError, match="key=value") as refused:
        parse_assignment(assignment)
    assert "--set lora.rank=16" in refused.value.run


@pytest.mark.parametrize("value", ["[q_proj", "a: b: c", "[" * 3000])
def test_a_value_that_is_no_yaml_is_refused(value):
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_assignment(f"lora.target_modules={value}")


# ---------------------------------------------------------------- config: files


@given(run_configs)
def test_a_configuration_comes_back_from_its_yaml(config):
    assert build_config(yaml.safe_load(to_yaml(config))) == config


def test_a_next_line_character_comes_back_from_the_yaml():
    config = build_config({"data": {"system_prompt": "one\x85two"}})
    assert build_config(yaml.safe_load(to_yaml(config))) == config


def test_the_yaml_keeps_the_documented_order_and_readable_letters():
    text = to_yaml(build_config({"data": {"system_prompt": "Você é útil."}}))
    assert "Você é útil." in text
    assert [line[:-1] for line in text.splitlines() if line[0].isalpha()] == list(RunConfig.model_fields)


def test_a_configuration_file_is_read_and_an_empty_one_has_no_keys(tmp_path):
    (tmp_path / "run.yaml").write_text("lora:\n  rank: 4\n")
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert read_config(tmp_path / "run.yaml") == {"lora": {"rank": 4}}
    assert read_config(tmp_path / "empty.yaml") == {}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"- a\n- b\n", "not a mapping"),
        (b"a: [1", "not valid YAML"),
        (b"\xff\xfe\x00bad", "not valid YAML"),
        (b"a: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_by_its_name(tmp_path, content, why):
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=why) as refused:
        read_config(tmp_path / "run.yaml")
    assert refused.value.where == str(tmp_path / "run.yaml")


def test_a_missing_file_is_refused_by_its_name(tmp_path):
    with pytest.raises(ConfigError, match="No such file") as refused:
        read_config(tmp_path / "nope.yaml")
    assert refused.value.where.endswith("nope.yaml")


# ---------------------------------------------------------------- config: difference


def test_a_difference_names_each_key_with_both_values():
    old = build_config({"lora": {"rank": 8}, "data": {"columns": {"question": "q"}}})
    new = build_config({"lora": {"rank": 16}, "data": {"columns": {"answer": "a"}}})
    assert difference(old, new) == [
        "lora.rank: 8 → 16",
        "data.columns.question: q → None",
        "data.columns.answer: None → a",
    ]


def test_the_word_none_is_not_nothing():
    old, new = build_config(), build_config({"data": {"system_prompt": "None"}})
    assert difference(old, new) == ["data.system_prompt: None → None"]


@given(run_configs, run_configs)
def test_there_is_a_difference_exactly_when_two_configurations_are_not_equal(a, b):
    assert (difference(a, b) == []) == (a == b)
    assert difference(a, a) == []


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_valid_configuration(name):
    assert build_config(preset(name)).lora.target_modules == ("q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize(
    ("name", "batch", "accumulation", "length"),
    [("mac-8gb", 1, 2, 256), ("mac-16gb", 2, 2, 512), ("mac-32gb", 4, 1, 1024)],
)
def test_a_preset_has_the_promised_size_and_schedule(name, batch, accumulation, length):
    config = build_config(preset(name))
    training = config.training
    assert (training.batch_size, training.gradient_accumulation) == (batch, accumulation)
    assert config.data.max_seq_length == length
    assert (config.lora.rank, config.lora.alpha) == (8, 16)
    assert (training.learning_rate, training.warmup_steps, training.num_epochs) == (2e-4, 100, 3)
    assert config.quantization.scheme == "int4"


@pytest.mark.parametrize(
    ("gib", "name"),
    [
        (4, "mac-8gb"),
        (8, "mac-8gb"),
        (15.6, "mac-16gb"),
        (24, "mac-16gb"),
        (31, "mac-32gb"),
        (512, "mac-32gb"),
    ],
)
def test_a_machine_gets_the_preset_of_its_class_although_it_reports_slightly_less(gib, name):
    assert name_for(int(gib * GIB)) == name


@given(st.integers(1, 2**42), st.integers(1, 2**42))
def test_more_memory_never_means_a_smaller_preset(a, b):
    order = ["mac-8gb", "mac-16gb", "mac-32gb"]
    small, large = sorted((a, b))
    assert order.index(name_for(small)) <= order.index(name_for(large))


@pytest.mark.parametrize(("gib", "batch"), [(8, 1), (16, 2), (64, 4)])
def test_auto_is_the_preset_of_this_machine(monkeypatch, gib, batch):
    memory = type("Memory", (), {"total": gib * GIB})()
    monkeypatch.setattr(presets.psutil, "virtual_memory", lambda: memory)
    assert preset("auto")["training"]["batch_size"] == batch


def test_changing_a_preset_that_was_handed_out_does_not_change_the_next():
    preset("mac-8gb")["training"]["batch_size"] = 99
    assert preset("mac-8gb")["training"]["batch_size"] == 1


def test_an_unknown_preset_is_refused_with_the_ones_there_are():
    with pytest.raises(ConfigError, match=r"'mac'.*mac-8gb, mac-16gb, mac-32gb, auto"):
        preset("mac")


# ---------------------------------------------------------------- errors


def test_an_error_says_what_where_and_the_next_command():
    error = MlxQloraError("It broke.", where="a.yaml", run="mend a.yaml")
    assert str(error) == "It broke.\n  at: a.yaml\nRun: mend a.yaml"
    assert str(MlxQloraError("It broke.")) == "It broke."
    assert error.exit_code == 2


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143)])
def test_an_interrupted_run_exits_with_128_and_the_signal(number, code):
    error = Interrupted("Stopped.", signal_number=number, run="resume")
    assert error.exit_code == code
    assert MlxQloraError("x").exit_code == 2


def test_long_lists_are_cut_and_counted():
    said = listed([f"line {i}" for i in range(25)]).splitlines()
    assert said[:20] == [f"  line {i}" for i in range(20)]
    assert said[20:] == ["  … and 5 more"]
    assert listed(["one"] * 20).count("\n") == 19


def test_defaults_make_a_run():
    assert build_config() == RunConfig()
    assert TrainingConfig().max_steps is None
