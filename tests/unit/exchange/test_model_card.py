import json
import re
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_qlora.config import LoraConfig, ModelConfig, QuantizationConfig, RunConfig, build_config
from mlx_qlora.errors import AdapterError, ConfigError, MlxQloraError, StorageError, WeightsError
from mlx_qlora.exchange.card_contents import PublishedFile, gather, refuse_leaks
from mlx_qlora.exchange.card_run import run_facts, shared_config
from mlx_qlora.exchange.card_secrets import find_leaks
from mlx_qlora.exchange.card_source import License, describe, find_license
from mlx_qlora.exchange.model_card import CardFacts, write_card
from mlx_qlora.lora.adapter import AdapterInfo, read_adapter_info, save_adapter, text_sha256
from tests.checkpoints import make_checkpoint

BASE = "ana/base"
TEMPLATE = "{{ messages }}"
SECRETS = {
    "hugging face": "hf_" + "Ab1" * 11,
    "openai": "sk-proj-" + "a1B2" * 8,
    "github": "ghp_" + "a1B2" * 9,
    "aws": "AKIA" + "ABCD" * 4,
    "private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
}


def save_info(folder: Path, base: str, **changes) -> Path:
    info = AdapterInfo(
        **{
            "model": ModelConfig(path=base),
            "quantization": QuantizationConfig(scheme="int4"),
            "lora": LoraConfig(rank=4, target_modules=["q_proj"]),
            "fingerprint": "sha256:" + "0" * 64,
            "chat_template": TEMPLATE,
            "chat_template_sha256": text_sha256(TEMPLATE),
            **changes,
        }
    )
    name = "model.layers.0.self_attn.q_proj"
    save_adapter(folder, {f"{name}.lora_a": mx.ones((8, 4)), f"{name}.lora_b": mx.ones((4, 8))}, info, 1)
    return folder


@pytest.fixture
def adapter(tmp_path):
    """An adapter of a base in a folder, with everything around it that a run leaves, and more."""
    folder = save_info(tmp_path / "farense", str(tmp_path / "base"))
    (folder / "checkpoints").mkdir()
    for name in ("metrics.jsonl", "run.yaml", "report.md", "train.jsonl", ".env", "notes.txt", "token"):
        (folder / name).write_text("private")
    (folder / "loss.png").write_bytes(b"\x89PNG")
    return folder


def names(folder: Path, **settings) -> set[str]:
    return {file.path for file in gather(describe(folder, **settings))[0]}


def card_of(folder: Path, **facts) -> str:
    licence = License(id="mit", found_in="--license")
    return write_card(
        describe(folder, BASE), CardFacts(**{"repo": "ana/farense", "license": licence, **facts})
    )


def metadata(card: str) -> dict:
    from huggingface_hub import ModelCard

    return ModelCard(card).data.to_dict()


def test_only_files_that_are_known_to_be_needed_are_published(adapter):
    (adapter / "LICENSE").write_text("terms")
    assert names(adapter, base_model=BASE) == {
        "adapters.safetensors",
        "adapter_config.json",
        "loss.png",
        "LICENSE",
    }
    left_out = gather(describe(adapter, BASE))[1]
    assert set(left_out) == {
        ".env", "checkpoints/", "metrics.jsonl", "notes.txt", "report.md", "run.yaml", "token", "train.jsonl",
    }  # fmt: skip


def test_a_published_adapter_names_its_base_by_id_and_is_the_same_otherwise(adapter, tmp_path):
    files, _ = gather(describe(adapter, BASE))
    out = tmp_path / "out"
    out.mkdir()
    for file in files:
        content = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
        (out / file.path).write_bytes(content)
    before, after = read_adapter_info(adapter), read_adapter_info(out)
    assert after.model.path == BASE
    assert after == before.model_copy(update={"model": after.model})
    assert str(tmp_path) not in (out / "adapter_config.json").read_text()
    assert json.loads((out / "adapter_config.json").read_text())["model"] == BASE


def test_what_concerns_this_machine_alone_is_not_published(tmp_path):
    model = ModelConfig(path=BASE, revision="abc", offload=True, offload_budget_gib=3.0)
    folder = save_info(tmp_path / "a", BASE, model=model)
    content = {f.path: f.content for f in gather(describe(folder))[0]}["adapter_config.json"]
    assert json.loads(content)["mlx_qlora"]["model"] == {
        "path": BASE, "revision": "abc", "trust_remote_code": False, "dtype": "auto",
    }  # fmt: skip


def test_a_base_in_the_hubs_own_cache_is_named_with_its_revision(tmp_path):
    revision = "a" * 40
    cached = tmp_path / "models--mistralai--Mistral-7B" / "snapshots" / revision
    found = describe(save_info(tmp_path / "a", str(cached)))
    assert (found.base_model, found.base_revision) == ("mistralai/Mistral-7B", revision)


def test_a_base_that_was_a_gguf_file_on_the_hub_is_its_repository(tmp_path):
    assert describe(save_info(tmp_path / "a", "ana/base:base.Q4_K_M.gguf")).base_model == BASE


def test_a_base_that_nobody_else_has_is_asked_for(adapter, tmp_path):
    with pytest.raises(ConfigError, match="say its hub id") as caught:
        describe(adapter)
    assert "--base-model OWNER/NAME" in caught.value.run
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "mlx_qlora_manifest.json").write_text(json.dumps({"source": "ana/big"}))
    with pytest.raises(ConfigError) as caught:
        describe(adapter)
    assert "--base-model ana/big" in caught.value.run
    with pytest.raises(ConfigError, match="OWNER/NAME"):
        describe(adapter, "big")


def test_broken_weights_are_not_published(adapter, tmp_path, tiny_llama_folder):
    (adapter / "adapters.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(WeightsError):
        describe(adapter, BASE)
    model = make_checkpoint(tmp_path / "m", "llama-tied", tiny_llama_folder, num_shards=2)
    (model / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError):
        describe(model, BASE)
    save_info(adapter, BASE)
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError):
        describe(adapter, BASE)
    with pytest.raises(MlxQloraError, match="neither an adapter"):
        describe(tmp_path / "nowhere", BASE)


@pytest.fixture
def quantized(tiny_llama_folder, tmp_path):
    from mlx_qlora import quantize

    quantize(str(tiny_llama_folder), tmp_path / "int4", "int4")
    return tmp_path / "int4"


def test_a_quantized_model_is_told_from_a_fused_one(quantized, tiny_llama_folder):
    assert describe(quantized, BASE).relation == "quantized"
    assert describe(tiny_llama_folder, BASE).relation == "finetune"
    manifest = quantized / "mlx_qlora_manifest.json"
    adapter = {"path": "/srv/ana/adapters/farense", "lora": {"variant": "dora", "rank": 8}}
    loss = {"weight_error": 0.0125, "notes": ["validation rows of /srv/ana/diary"]}
    fused = {**json.loads(manifest.read_text()), "adapter": adapter, "loss": loss}
    manifest.write_text(json.dumps(fused))
    publication = describe(quantized, BASE)
    assert publication.relation == "finetune"
    published = {file.path: file for file in gather(publication)[0]}[manifest.name].content
    assert b"/srv" not in published
    assert json.loads(published)["adapter"]["path"] == "farense"
    card = card_of(quantized)
    assert "an adapter fused into its weights" in card
    assert "| rank | 8 |" in card
    assert "0.0125" in card


def test_a_model_brings_all_that_loads_it_and_no_path_of_its_source(quantized, tiny_llama_folder):
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config, "_name_or_path": "/home/ana/base"}))
    (quantized / "data.jsonl").write_text("private")
    (quantized / "modeling.py").write_text("print()")
    files, left_out = gather(describe(quantized, BASE))
    published = {file.path: file for file in files}
    assert published.keys() == {
        "config.json", "mlx_qlora_manifest.json", "model.safetensors", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert {"data.jsonl", "modeling.py"} <= set(left_out)
    assert json.loads(published["config.json"].content)["_name_or_path"] == BASE
    assert json.loads(published["mlx_qlora_manifest.json"].content)["source"] == BASE
    refuse_leaks(files, [quantized, tiny_llama_folder], None)
    (quantized / "config.json").write_text(json.dumps({**config, "model_file": "modeling.py"}))
    assert "modeling.py" in names(quantized, base_model=BASE)  # without its code it would not load


@pytest.mark.parametrize("relation", ["adapter", "quantized", "finetune"])
def test_the_metadata_is_what_the_hubs_client_reads(relation, adapter, quantized, tiny_llama_folder):
    folder = {"adapter": adapter, "quantized": quantized, "finetune": tiny_llama_folder}[relation]
    licence = License(id="other", name="base-terms", link="https://example.com/terms", found_in="README.md")
    found = metadata(card_of(folder, languages=["pt"], license=licence))
    assert found["base_model"] == BASE
    assert found["base_model_relation"] == relation
    assert found["library_name"] == "mlx"
    assert found["pipeline_tag"] == "text-generation"
    assert found["language"] == ["pt"]
    assert (found["license"], found["license_name"]) == ("other", "base-terms")
    assert "mlx-qlora" in found["tags"]


def test_a_card_says_how_to_use_it_only_where_that_is_true(adapter, quantized):
    card = card_of(adapter)
    for words in (
        "--adapter-path ana/farense",
        f"mlx_lm.generate --model {BASE}",
        "mlx-qlora export-peft farense",
    ):
        assert words in card
    model = card_of(quantized)
    assert "mlx_lm.generate --model ana/farense" in model
    assert "export-peft" not in model
    config = json.loads((quantized / "config.json").read_text())
    config["quantization"]["mode"] = "nf4"
    (quantized / "config.json").write_text(json.dumps(config))
    assert "mlx_lm.generate" not in card_of(quantized)


def test_an_unknown_licence_is_said_to_be_unknown(adapter):
    card = card_of(adapter, license=None)
    assert "license" not in metadata(card)
    assert "unknown: set --license" in card


def test_the_same_facts_give_the_same_card(adapter):
    assert card_of(adapter) == card_of(adapter)


LICENSES = {
    "card": ({"README.md": "---\nlicense: llama3.1\n---\n# x\n"}, "llama3.1"),
    "licence file": ({"LICENSE": "\n   Apache License\n   Version 2.0, January 2004\n"}, "apache-2.0"),
    "licence text": ({"LICENSE.txt": "MIT License\n\nCopyright"}, "mit"),
    "a card without one": ({"README.md": "---\ntags: [x]\n---\n"}, None),
    "a broken card": ({"README.md": "---\nlicense: [\n---\n"}, None),
    "unknown terms": ({"LICENSE": "All rights reserved"}, None),
    "nothing": ({}, None),
}


@pytest.mark.parametrize("case", LICENSES)
def test_a_licence_is_inherited_from_the_base_models_folder(case, adapter, tmp_path):
    files, expected = LICENSES[case]
    (tmp_path / "base").mkdir()
    for name, text in files.items():
        (tmp_path / "base" / name).write_text(text)
    found = find_license(describe(adapter, BASE))
    assert (found.id if found else None) == expected


def test_a_licence_is_inherited_from_the_base_in_the_hubs_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "models--ana--base"
    (cached / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    (cached / "snapshots" / ("a" * 40) / "README.md").write_text("---\nlicense: gemma\n---\n")
    assert find_license(describe(save_info(tmp_path / "a", BASE))).id == "gemma"


@pytest.mark.parametrize("kind", SECRETS)
@given(before=st.text(alphabet=' \n":{}/', max_size=20), after=st.text(alphabet=' \n",}', max_size=20))
def test_a_secret_is_found_anywhere_with_its_line_and_never_repeated(kind, before, after):
    secret = SECRETS[kind]
    found = find_leaks("f.json", before + secret + after, is_vocabulary=True)
    assert len(found) == 1
    assert found[0].startswith(f"f.json:{before.count(chr(10)) + 1}: ")
    assert secret[:12] not in found[0]


@pytest.mark.parametrize(
    "text",
    [
        "/home/ana/x",
        "file:///Users/ana/x",
        '"C:\\\\Users\\\\ana\\\\x"',
        "a token: TOKEN",
        "at /srv/ana/run/a",
    ],
)
def test_a_home_a_folder_and_the_token_in_use_are_found(text):
    assert find_leaks("f", text, ["/srv/ana/run", "TOKEN"])


@pytest.mark.parametrize(
    "text",
    [
        "https://example.com/home/ana",
        "hf_transfer",
        "task-oriented",
        "sha256:" + "ab12" * 16,
        "the /home/ page",
    ],
)
def test_innocent_words_are_no_leak(text):
    assert find_leaks("f", text, ["/srv/ana/run", "TOKEN"]) == []


def test_pieces_of_words_in_a_vocabulary_are_nobodys_home():
    assert find_leaks("tokenizer.json", '"/home/ana"', is_vocabulary=True) == []
    assert find_leaks("tokenizer.json", SECRETS["github"], is_vocabulary=True)


def test_everything_that_is_sent_is_read_through_and_all_is_told_at_once(adapter, tmp_path):
    save_info(adapter, str(tmp_path / "base"), system_prompt=f"key {SECRETS['openai']} in /home/ana/notes")
    tensors = mx.load(str(adapter / "adapters.safetensors"))
    mx.save_safetensors(str(adapter / "adapters.safetensors"), tensors, {"made_by": "/home/ana/run.py"})
    files, _ = gather(describe(adapter, BASE))
    card = PublishedFile("README.md", f"see {adapter}".encode())
    with pytest.raises(StorageError, match="Nothing was sent") as caught:
        refuse_leaks([*files, card], [adapter], None)
    said = str(caught.value)
    for words in ("README.md:1", "an API key (sk-pro…)", "/home/ana", "adapters.safetensors:1"):
        assert words in said
    assert SECRETS["openai"] not in said


def entries():
    memory = {"footprint_bytes": 3 * 1024**3, "mlx_peak_bytes": 2 * 1024**3}

    def step(number, loss, tokens):
        counts = {"step": number, "target_tokens": tokens, "tokens": 2 * tokens, "seconds": 2.0}
        return {"event": "StepDone", **counts, "loss_nats": loss, "memory": memory, "skipped": loss is None}

    notes = [
        "train: 8 rows, 100 tokens (50 targets); length 9 median, 9 at 90 %, 9 at 99 %, 9 at most",
        "valid: 1 row unusable and left out",
        "  rows.jsonl:3: an answer about a person",
        "hidden states are kept in /srv/ana/cache",
        "warning: 1 row of valid or test, or their prompts, stand in train: rows.jsonl:7",
    ]
    return [
        {"event": "RunStarted", "trainable_parameters": 10, "total_parameters": 1000, "notes": notes},
        {"event": "Validated", "step": 0, "loss_nats": 3.0, "is_best": True},
        step(1, 2.0, 10),
        step(2, None, 7),
        step(3, 1.0, 30),
        {"event": "Validated", "step": 3, "loss_nats": 1.5, "is_best": True},
        {"event": "RunFinished", "peak_memory_bytes": 4 * 1024**3},
    ]  # fmt: skip


def test_the_figures_of_a_run_are_its_own():
    facts = run_facts(
        entries(), "## Environment\n\n|  |  |\n| --- | --- |\n| device | gpu, M1 |\n| system | box-7 |\n"
    )
    rows = dict(facts.rows)
    assert facts.validations == [(0, None, 3.0), (3, pytest.approx((2.0 * 10 + 1.0 * 30) / 40), 1.5)]
    assert facts.best_step == 3
    assert rows["tokens read"] == "94 (47 of them targets)"
    assert rows["tokens per second"] == f"{94 / 6:.0f}"
    assert rows["peak memory of the process"] == "4.00 GiB"
    assert rows["MLX peak, without its cache"] == "2.00 GiB"
    assert rows["device"] == "gpu, M1"
    assert "system" not in rows


def test_statistics_of_the_data_are_told_and_never_a_row_or_a_file_of_it(adapter):
    facts = run_facts(entries())
    assert facts.data == entries()[0]["notes"][:2]
    card = card_of(adapter, run=facts)
    assert "person" not in card
    assert "rows.jsonl" not in card
    assert "best |" in card


def test_the_configuration_is_shown_without_local_paths():
    config = build_config({"model": {"path": "/srv/ana/base"}, "data": {"path": "/srv/ana/diary/rows.jsonl"}})
    text = shared_config(config, BASE)
    assert "/srv" not in text
    assert f"path: {BASE}" in text
    assert re.search(r"^  path: rows.jsonl$", text, re.MULTILINE)
    assert shared_config(RunConfig(), BASE)
