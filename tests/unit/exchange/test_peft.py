"""exchange/peft.py and its parts, on folders made by hand; against peft: tests/integration/test_peft.py."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_qlora.__main__ import load_command, run
from mlx_qlora.config import LoraConfig
from mlx_qlora.errors import AdapterError, MlxQloraError, StorageError
from mlx_qlora.exchange.peft import export_peft, import_peft
from mlx_qlora.inference.generate import load_assistant
from mlx_qlora.lora.adapter import read_adapter_info
from tests.checkpoints import make_checkpoint, raw, tensors_of, write_safetensors

TOKENS = mx.array([[1, 5, 9, 33, 2]])
SHAPES = {  # (out, in) of transformers' own layout
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (128, 64),
    "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128),
}
RANK, ALPHA = 4, 6


@pytest.fixture(scope="module")
def base(tiny_llama_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("peft") / "base"
    return make_checkpoint(folder, "llama-untied", tiny_llama_folder, dtype=mx.float32)


def noise(shape: tuple[int, ...], seed: int) -> mx.array:
    return 0.1 * mx.random.normal(shape, key=mx.random.key(seed))


def peft_tensors(paths: list[str], *, has_lengths: bool = False) -> dict[str, mx.array]:
    """A and B of linear layers as PEFT stores them, and lengths."""
    tensors = {}
    for index, path in enumerate(paths):
        out, width = (320, 64) if path == "lm_head" else SHAPES[path.split(".", 3)[-1]]
        tensors[f"base_model.model.{path}.lora_A.weight"] = noise((RANK, width), index)
        tensors[f"base_model.model.{path}.lora_B.weight"] = noise((out, RANK), index + 100)
        if has_lengths:
            tensors[f"base_model.model.{path}.lora_magnitude_vector"] = 5 + noise((out,), index + 200)
    return tensors


def all_paths(*names: str) -> list[str]:
    """Of these layers in both blocks."""
    return [f"model.layers.{i}.{name}" for i in range(2) for name in SHAPES if name.split(".")[1] in names]


def peft_folder(folder: Path, tensors: dict[str, mx.array], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tree = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, **config}
    (folder / "adapter_config.json").write_text(json.dumps(tree))
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors, metadata={"format": "pt"})
    return folder


def q_adapter(folder: Path, **config: Any) -> Path:
    """The simplest: LoRA on every q_proj."""
    return peft_folder(folder, peft_tensors(all_paths("q_proj")), **{"target_modules": ["q_proj"], **config})


def logits(adapter: Path) -> mx.array:
    return load_assistant(adapter_path=adapter).model(TOKENS)


def merged_logits(base: Path, folder: Path, tensors: dict[str, mx.array], *, scale: float) -> mx.array:
    """Of a copy of the base into whose weights scale · B A was added by hand, rows brought to the lengths."""
    weights = tensors_of(base)
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        stem = f"base_model.model.{path}"
        weight = weights[f"{path}.weight"] + scale * tensors[f"{stem}.lora_B.weight"] @ tensors[name]
        if (lengths := tensors.get(f"{stem}.lora_magnitude_vector")) is not None:
            weight = weight * (lengths / mx.linalg.norm(weight, axis=1))[:, None]
        weights[f"{path}.weight"] = weight
    shutil.copytree(base, folder)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    return load_assistant(str(folder)).model(TOKENS)


@pytest.mark.parametrize(
    ("config", "scale", "has_lengths"),
    [
        ({}, ALPHA / RANK, False),
        ({"use_rslora": True}, ALPHA / RANK**0.5, False),
        ({"use_dora": True}, ALPHA / RANK, True),
    ],
)
def test_it_computes_what_the_formula_of_its_variant_says(base, tmp_path, config, scale, has_lengths):
    tensors = peft_tensors([*all_paths("q_proj", "v_proj", "down_proj"), "lm_head"], has_lengths=has_lengths)
    names = ["q_proj", "v_proj", "down_proj", "lm_head"]
    theirs = peft_folder(tmp_path / "theirs", tensors, target_modules=names, **config)
    import_peft(theirs, tmp_path / "ours", model=str(base))
    wanted = merged_logits(base, tmp_path / "merged", tensors, scale=scale)
    difference = mx.abs(logits(tmp_path / "ours") - wanted).max() / mx.abs(wanted).max()
    assert difference.item() < 1e-5


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("has_lengths", [False, True])
def test_there_and_back_again_every_byte_is_the_same(base, tmp_path, has_lengths, dtype):
    tensors = peft_tensors(all_paths("q_proj", "up_proj"), has_lengths=has_lengths)
    tensors = {name: array.astype(dtype) for name, array in tensors.items()}
    config = {"target_modules": ["q_proj", "up_proj"], "use_dora": has_lengths, "lora_dropout": 0.25}
    theirs = peft_folder(tmp_path / "theirs", tensors, **config)
    import_peft(theirs, tmp_path / "ours", model=str(base))
    export_peft(tmp_path / "ours", tmp_path / "back")
    back = mx.load(str(tmp_path / "back" / "adapter_model.safetensors"))
    assert back.keys() == tensors.keys()
    for name, array in tensors.items():
        assert (back[name].dtype, back[name].shape) == (dtype, array.shape)
        assert raw(back[name]) == raw(array)
    tree = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    for key, value in {**config, "r": RANK, "lora_alpha": ALPHA, "peft_type": "LORA"}.items():
        assert tree[key] == value
    assert tree["base_model_name_or_path"] == str(base)
    import_peft(tmp_path / "back", tmp_path / "again", model=str(base))
    for name in ("adapters.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


@pytest.mark.parametrize(
    ("paths", "config", "lora"),
    [
        (all_paths("q_proj", "o_proj"), {"target_modules": ["q_proj", "o_proj"]}, ("o_proj", "q_proj")),
        (all_paths("q_proj")[1:], {"target_modules": ["q_proj"], "layers_to_transform": [1]}, 1),
        (all_paths("q_proj")[1:], {"target_modules": ["q_proj"], "layers_to_transform": 1}, 1),
        (
            all_paths("q_proj")[:1],
            {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
            ("model.layers.0.self_attn.q_proj",),
        ),
        (all_paths(*(name.split(".")[1] for name in SHAPES)), {"target_modules": "all-linear"}, None),
        (all_paths("up_proj"), {"target_modules": r".*\.up_(proj|down)"}, ("up_proj",)),
        (
            all_paths("q_proj", "v_proj")[1:],
            {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
            tuple(sorted(all_paths("q_proj", "v_proj")[1:])),
        ),
    ],
)
def test_which_layers_it_is_on_comes_over_and_goes_back(base, tmp_path, paths, config, lora):
    tensors = peft_tensors(paths)
    import_peft(peft_folder(tmp_path / "theirs", tensors, **config), tmp_path / "ours", model=str(base))
    got = read_adapter_info(tmp_path / "ours").lora
    if isinstance(lora, tuple):
        assert got.target_modules == lora
    elif lora is not None:
        assert (got.target_modules, got.num_layers) == (("q_proj",), lora)
    export_peft(tmp_path / "ours", tmp_path / "back")
    import_peft(tmp_path / "back", tmp_path / "again", model=str(base))
    assert read_adapter_info(tmp_path / "again").lora == got
    assert mx.load(str(tmp_path / "back" / "adapter_model.safetensors")).keys() == tensors.keys()


def embedding_tensors() -> dict[str, mx.array]:
    stem = "base_model.model.model.embed_tokens.lora_embedding"
    return {f"{stem}_A": noise((RANK, 320), 1), f"{stem}_B": noise((64, RANK), 2)}


def test_an_embedding_comes_over_and_goes_back_and_its_copy_is_left_out(base, tmp_path):
    tensors = embedding_tensors()
    copy = {
        "base_model.model.model.embed_tokens.base_layer.weight": tensors_of(base)["model.embed_tokens.weight"]
    }
    theirs = peft_folder(tmp_path / "theirs", {**tensors, **copy}, target_modules=["embed_tokens"])
    result = import_peft(theirs, tmp_path / "ours", model=str(base))
    assert result.notes == ("left out, as the base has it too: model.embed_tokens.weight",)
    embed = load_assistant(adapter_path=tmp_path / "ours").model.model.embed_tokens
    a, b = tensors.values()
    wanted = copy.popitem()[1] + ALPHA / RANK * (b @ a).T
    assert mx.allclose(embed(TOKENS), wanted[TOKENS], atol=1e-5)
    export_peft(tmp_path / "ours", tmp_path / "back")
    back = mx.load(str(tmp_path / "back" / "adapter_model.safetensors"))
    assert {name: raw(array) for name, array in back.items()} == {n: raw(a) for n, a in tensors.items()}


def test_an_embedding_that_was_trained_as_a_whole_is_refused(base, tmp_path):
    changed = {"base_model.model.model.embed_tokens.base_layer.weight": mx.zeros((320, 64))}
    theirs = peft_folder(tmp_path / "t", {**embedding_tensors(), **changed}, target_modules=["embed_tokens"])
    with pytest.raises(AdapterError, match=r"embed_tokens\.base_layer\.weight: .*trained as a whole"):
        import_peft(theirs, tmp_path / "ours", model=str(base))


def test_a_tied_embedding_is_refused_because_peft_leaves_the_head_alone(tiny_llama_folder, tmp_path):
    base = make_checkpoint(tmp_path / "tied", "llama-tied", tiny_llama_folder, dtype=mx.float32)
    theirs = peft_folder(tmp_path / "t", embedding_tensors(), target_modules=["embed_tokens"])
    with pytest.raises(AdapterError, match="embed_tokens: the embedding is the output head too"):
        import_peft(theirs, tmp_path / "ours", model=str(base))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern = {'q_proj': 8}"),
    ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern = {'q_proj': 8}"),
    ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\]"),
    ({"bias": "all"}, "bias = 'all'"),
    ({"bias": "lora_only"}, "bias = 'lora_only'"),
    ({"lora_bias": True}, "lora_bias = True"),
    ({"use_qalora": True}, "use_qalora = True"),
    ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
    ({"peft_type": "PROMPT_TUNING"}, "peft_type = 'PROMPT_TUNING'"),
    ({"task_type": "SEQ_CLS"}, "task_type = 'SEQ_CLS'"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out = True"),
    ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices = \[1, 2\]"),
    ({"layer_replication": [[0, 1], [0, 2]]}, r"layer_replication = \[\[0, 1\], \[0, 2\]\]"),
    ({"target_parameters": ["mlp.experts"]}, "target_parameters = "),
    ({"alora_invocation_tokens": [5]}, r"alora_invocation_tokens = \[5\]"),
    ({"use_dora": True, "use_rslora": True}, "use_rslora = true with use_dora = true"),
    ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights = 'pissa_niter_16'.*path_initial_model"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights = 'loftq'"),
    ({"megatron_config": {"a": 1}}, "megatron_config = {'a': 1}"),
    ({"something_new": 3}, "something_new = 3"),
]


@pytest.mark.parametrize(("config", "said"), REFUSED)
def test_what_has_no_like_here_is_refused_by_name_and_value(base, tmp_path, config, said):
    theirs = q_adapter(tmp_path / "theirs", **config)
    with pytest.raises(AdapterError, match=said) as refused:
        import_peft(theirs, tmp_path / "ours", model=str(base))
    assert "merge_and_unload" in refused.value.run
    assert not (tmp_path / "ours").exists()


def test_all_refusals_are_said_at_once(base, tmp_path):
    theirs = q_adapter(
        tmp_path / "t", **{key: value for config, _ in REFUSED[:6] for key, value in config.items()}
    )
    with pytest.raises(AdapterError) as refused:
        import_peft(theirs, tmp_path / "ours", model=str(base))
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "bias", "lora_bias"):
        assert f"{key} = " in str(refused.value)


UNUSED = {
    "auto_mapping": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": {"rho": 2.0},
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": "eva",
    "layer_replication": None,
    "loftq_config": {},
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "rank_pattern": {},
    "use_qalora": False,
}


def test_what_changes_nothing_is_passed_over(base, tmp_path):
    import_peft(q_adapter(tmp_path / "theirs", **UNUSED), tmp_path / "ours", model=str(base))
    assert read_adapter_info(tmp_path / "ours").lora == LoraConfig(
        rank=RANK, alpha=ALPHA, target_modules=("q_proj",)
    )


def damaged(change: str) -> dict[str, mx.array]:
    tensors = peft_tensors(all_paths("q_proj"))
    first, second, *_ = tensors
    match change:
        case "missing":
            del tensors[second]
        case "of another rank":
            tensors[first] = mx.zeros((RANK + 1, 64))
        case "of another width":
            tensors[first] = mx.zeros((RANK, 65))
        case "of a layer that is not there":
            tensors[first.replace("layers.0", "layers.7")] = tensors.pop(first)
        case "no number":
            tensors[first] = mx.full((RANK, 64), float("nan"))
        case "whole numbers":
            tensors[first] = mx.zeros((RANK, 64), mx.int32)
        case "of nothing known":
            tensors["../../etc/passwd"] = mx.zeros(3)
        case "lengths without DoRA":
            tensors[first.replace("lora_A.weight", "lora_magnitude_vector")] = mx.zeros(64)
        case "half of the layers":
            tensors = {name: array for name, array in tensors.items() if "layers.0" in name}
        case "a layer that is not named":
            tensors |= peft_tensors(all_paths("v_proj"))
        case "a bias":
            tensors[first.replace("lora_A.weight", "lora_B.bias")] = mx.zeros(64)
        case "twice":
            for ending in (".lora_magnitude_vector", ".lora_magnitude_vector.weight"):
                tensors[first.removesuffix(".lora_A.weight") + ending] = mx.zeros(64)
        case "nothing":
            tensors = {"x": mx.zeros(1)}
    return tensors


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("missing", r"layers\.0\.self_attn\.q_proj\.lora_b: missing"),
        ("of another rank", r"q_proj\.lora_a: \(64, 5\), but the base model and the rank make it \(64, 4\)"),
        ("of another width", r"q_proj\.lora_a: \(65, 4\)"),
        ("of a layer that is not there", r"layers\.7\.self_attn\.q_proj: the base model has no linear layer"),
        ("no number", r"q_proj\.lora_a: holds what is no number"),
        ("whole numbers", "stored as I32"),
        ("of nothing known", r"\.\./\.\./etc/passwd: no tensor of a low-rank update"),
        ("lengths without DoRA", r"q_proj\.m: not of this kind of adapter"),
        ("half of the layers", r"layers\.1\.self_attn\.q_proj: named in target_modules, but without tensors"),
        ("a layer that is not named", r"v_proj: has tensors, but target_modules leave it out"),
        ("a bias", r"lora_B\.bias: no tensor of a low-rank update"),
        ("twice", "twice, under two names"),
        ("nothing", "there is no tensor of a low-rank update"),
    ],
)
def test_tensors_that_do_not_fit_are_named(base, tmp_path, change, said):
    theirs = peft_folder(tmp_path / "theirs", damaged(change), target_modules=["q_proj"])
    with pytest.raises(AdapterError, match=said):
        import_peft(theirs, tmp_path / "ours", model=str(base))
    assert not (tmp_path / "ours").exists()
    assert not list(tmp_path.glob(".ours*"))


def test_a_pickle_is_refused_with_the_way_round(base, tmp_path):
    theirs = q_adapter(tmp_path / "theirs")
    (theirs / "adapter_model.safetensors").rename(theirs / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickle") as refused:
        import_peft(theirs, tmp_path / "ours", model=str(base))
    assert "weights_only=True" in refused.value.run


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "null", "3", "[" * 100_000, '{"r": 4}', '{"peft_type": "LORA", "r": -1}']
)
def test_a_broken_configuration_is_an_adapter_error(base, tmp_path, text):
    theirs = q_adapter(tmp_path / "theirs")
    (theirs / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError):
        import_peft(theirs, tmp_path / "ours", model=str(base))


def test_a_broken_weight_file_is_an_adapter_error(base, tmp_path):
    theirs = q_adapter(tmp_path / "theirs")
    file = theirs / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(AdapterError, match="truncated"):
        import_peft(theirs, tmp_path / "ours", model=str(base))
    write_safetensors(file, {"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
    with pytest.raises(AdapterError):
        import_peft(theirs, tmp_path / "ours", model=str(base))


@pytest.mark.parametrize("name", [None, "/etc", "../base", "./base", "~/base", "a/b/c"])
def test_a_path_that_the_adapter_names_is_not_followed(tmp_path, name):
    theirs = q_adapter(tmp_path / "theirs", base_model_name_or_path=name)
    with pytest.raises(AdapterError, match="hub id|does not name") as refused:
        import_peft(theirs, tmp_path / "ours")
    assert "--model" in refused.value.run


def test_what_is_at_the_output_stays_untouched(base, tmp_path):
    output = tmp_path / "ours"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="nothing was touched"):
        import_peft(q_adapter(tmp_path / "theirs"), output, model=str(base))
    assert [path.name for path in output.iterdir()] == ["notes.txt"]


def test_a_chat_template_saved_with_the_adapter_comes_along(base, tmp_path):
    theirs = q_adapter(tmp_path / "theirs")
    (theirs / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    import_peft(theirs, tmp_path / "ours", model=str(base))
    assert read_adapter_info(tmp_path / "ours").chat_template == "{{ messages[0]['content'] }}"
    export_peft(tmp_path / "ours", tmp_path / "back")
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"


def imported(base: Path, folder: Path) -> Path:
    import_peft(q_adapter(folder / "theirs"), folder / "ours", model=str(base))
    return folder / "ours"


def test_export_refuses_what_makes_up_for_a_quantized_base(base, tmp_path):
    ours = imported(base, tmp_path)
    tree = json.loads((ours / "adapter_config.json").read_text())
    tree["mlx_qlora"]["lora"]["init"] = "loftq"
    del tree["mlx_qlora_sha256"]
    (ours / "adapter_config.json").write_text(json.dumps(tree))
    with pytest.raises(AdapterError, match="loftq") as refused:
        export_peft(ours, tmp_path / "back")
    assert "fuse" in refused.value.run


def test_export_to_a_base_with_other_weights_needs_force(base, tiny_llama_folder, tmp_path):
    ours = imported(base, tmp_path)
    other = make_checkpoint(tmp_path / "other", "llama-untied", tiny_llama_folder, dtype=mx.float32, seed=5)
    with pytest.raises(AdapterError, match="other weights"):
        export_peft(ours, tmp_path / "back", model=str(other))
    assert export_peft(ours, tmp_path / "back", model=str(other), force=True).base_model == str(other)


def test_export_names_the_sixteen_bit_model_where_the_base_is_stored_quantized(base, tmp_path):
    from mlx_qlora.quantization.schemes import SCHEMES
    from mlx_qlora.weights.source import resolve_model
    from mlx_qlora.weights.stream import quantize_checkpoint

    quantize_checkpoint(resolve_model(str(base)), tmp_path / "int4", SCHEMES["int4"])
    import_peft(q_adapter(tmp_path / "theirs"), tmp_path / "ours", model=str(tmp_path / "int4"))
    with pytest.raises(AdapterError, match="quantized in MLX's format") as refused:
        export_peft(tmp_path / "ours", tmp_path / "back")
    assert "--model" in refused.value.run
    assert export_peft(tmp_path / "ours", tmp_path / "back", model=str(base)).base_model == str(base)


def test_both_commands_print_one_object_and_end_with_two_on_a_users_mistake(base, tmp_path, capsys):
    theirs, ours, back = q_adapter(tmp_path / "theirs"), tmp_path / "ours", tmp_path / "back"
    arguments = [str(theirs), "--output", str(ours), "--model", str(base), "--scheme", "int4", "--json"]
    assert run(load_command("import-peft"), arguments) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["num_adapted"], said["num_tensors"], said["lora"]["rank"]) == (2, 4, RANK)
    assert read_adapter_info(ours).quantization.scheme == "int4"
    assert run(load_command("export-peft"), [str(ours), "--output", str(back), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["base_model"] == str(base)
    assert run(load_command("import-peft"), arguments) == 2
    assert "nothing was touched" in capsys.readouterr().err
    assert run(load_command("export-peft"), [str(theirs), "--output", str(tmp_path / "x")]) == 2


def test_an_adapter_of_ours_given_to_the_import_is_told_apart(base, tmp_path):
    ours = imported(base, tmp_path)
    with pytest.raises(MlxQloraError, match="mlx-lm's format already"):
        import_peft(ours, tmp_path / "again", model=str(base))
