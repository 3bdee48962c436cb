"""What a person types, wrong input included: clear errors, exit code 2, no traceback, JSON alone."""

import json
import subprocess
import sys

import pytest

PYTHON = sys.executable


def run(*arguments: str, stdin: str | None = None, module: str = "mlx_qlora"):
    return subprocess.run(
        [PYTHON, "-m", module, *map(str, arguments)], capture_output=True, text=True, input=stdin, timeout=300
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"question": f"pergunta {i}?", "answer": f"resposta {i}"} for i in range(12)]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def adapter(tiny_llama_folder, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "adapters" / "one"
    done = run(
        "train", "--model", tiny_llama_folder, "--data", rows, "--adapter-path", folder,
        "--preset", "mac-8gb", "--set", "training.max_steps=3", "--json",
        "--set", "training.learning_rate=1e-2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_train_prints_the_promised_keys_and_leaves_the_promised_files(adapter):
    folder, result = adapter
    promised = {
        "steps", "tokens", "train_loss_nats", "val_loss_nats", "best_step", "peak_memory_bytes",
        "tokens_per_second", "adapter_path",
    }  # fmt: skip
    assert promised <= result.keys()
    assert result["steps"] == 3
    for name in (
        "adapters.safetensors",
        "adapter_config.json",
        "metrics.jsonl",
        "run.yaml",
        "report.md",
        "loss.png",
    ):
        assert (folder / name).stat().st_size > 0, name


def test_infer_streams_text_and_reads_standard_input(adapter):
    folder, _ = adapter
    asked = run("pergunta 1?", "--adapter-path", folder, "--max-tokens", 5, module="mlx_qlora.infer")
    piped = run(
        "-", "--adapter-path", folder, "--max-tokens", 5, stdin="pergunta 1?\n", module="mlx_qlora.infer"
    )
    assert asked.returncode == piped.returncode == 0, asked.stderr + piped.stderr
    assert asked.stdout == piped.stdout
    printed = run("infer", "pergunta 1?", "--adapter-path", folder, "--max-tokens", 5, "--json")
    answer = json.loads(printed.stdout)
    assert answer["text"].strip() == asked.stdout.strip()
    assert answer["generation_tokens"] <= 5
    assert answer.keys() >= {"prompt_tokens", "first_token_seconds", "tokens_per_second"}


def test_sampling_with_a_seed_is_repeatable(adapter):
    folder, _ = adapter
    options = ("--adapter-path", folder, "--max-tokens", 12, "--temperature", 1.5, "--top-p", 0.95)
    one, again, other = (run("infer", "oi", *options, "--seed", seed).stdout for seed in (1, 1, 2))
    assert one == again != other


def test_infer_without_anything_takes_the_newest_adapter(adapter):
    folder, _ = adapter
    done = subprocess.run(
        [PYTHON, "-m", "mlx_qlora.infer", "oi", "--max-tokens", "3"],
        capture_output=True, text=True, cwd=folder.parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "adapters/one" in done.stderr


def test_an_adapter_on_another_base_is_refused(adapter, tiny_llama_folder, tmp_path):
    import shutil

    import mlx.core as mx

    folder, _ = adapter
    other = tmp_path / "other"
    shutil.copytree(tiny_llama_folder, other)
    tensors = mx.load(str(other / "model.safetensors"))
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name] * 1.5
    mx.save_safetensors(str(other / "model.safetensors"), tensors, metadata={"format": "mlx"})
    done = run("infer", "oi", "--adapter-path", folder, "--model", other)
    assert done.returncode == 2
    assert "was trained on" in done.stderr


def test_evaluate_reports_loss_and_perplexity(adapter, rows):
    folder, _ = adapter
    done = run("evaluate", "--adapter-path", folder, "--data", rows, "--split", "train", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["perplexity"] == pytest.approx(2.718281828 ** result["loss_nats"], rel=1e-4)


MISTAKES = {
    "an unknown key": (["--set", "lora.rnk=3"], "lora.rnk"),
    "a value that does not fit": (["--set", "lora.rank=-1"], "lora.rank"),
    "an assignment without a value": (["--set", "lora.rank"], "key=value"),
    "an unknown preset": (["--preset", "mac-4gb"], "mac-8gb"),
    "a missing configuration": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "an unmatched layer": (["--set", "lora.target_modules=[qq_proj]"], "q_proj"),
    "an unknown scheme": (["--set", "quantization.scheme=int1"], "int4"),
    "a missing data file": (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    "a missing model": (["--model", "./nowhere"], "nowhere"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_error(mistake, tiny_llama_folder, rows, tmp_path):
    extra, said = MISTAKES[mistake]
    arguments = ["train", "--model", tiny_llama_folder, "--data", rows, "--adapter-path", tmp_path / "a"]
    done = run(*arguments, *extra, "--json")
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "a" / "run.yaml").exists()


def test_bad_rows_are_all_reported_at_once(tiny_llama_folder, tmp_path):
    data = tmp_path / "rows.jsonl"
    good = json.dumps({"question": "a?", "answer": "b"})
    data.write_text("\n".join([good, "{", good, '{"question": 3, "answer": "b"}', good]) + "\n")
    arguments = ["train", "--model", tiny_llama_folder, "--data", data, "--adapter-path", tmp_path / "a"]
    done = run(*arguments)
    assert done.returncode == 2
    assert "rows.jsonl:2" in done.stderr
    assert "rows.jsonl:4" in done.stderr
    skipped = run(*arguments, "--skip-bad-rows", "--set", "training.max_steps=1")
    assert skipped.returncode == 0, skipped.stderr


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["train", "--help"], ["infer", "--help"], ["demo", "--help"]]
)
def test_help_is_there_with_an_example(arguments):
    done = run(*arguments)
    text = done.stdout + done.stderr
    assert "Traceback" not in text
    assert "mlx-qlora" in text or "mlx_qlora" in text


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["train"], ["infer", "x", "--top-p", "7", "--model", "m"]]
)
def test_wrong_usage_exits_with_two(arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_plan_needs_config_json_alone_and_says_what_helps(tiny_llama_folder, tmp_path):
    (tmp_path / "config.json").write_text((tiny_llama_folder / "config.json").read_text())
    done = run("plan", "--model", tmp_path, "--preset", "mac-8gb", "--memory", "8GB", "--json")
    plan = json.loads(done.stdout)
    assert {"fits", "peak_bytes", "budget_bytes", "parts"} <= plan.keys()
    assert plan["fits"]
    assert sum(plan["parts"].values()) == plan["peak_bytes"]
    tight = ("--set", "training.memory_budget_gib=0.1", "--set", "training.batch_size=2")
    told = run("plan", "--model", tmp_path, "--preset", "mac-8gb", *tight)
    assert told.returncode == 0, told.stderr
    assert "It does not fit" in told.stdout
    assert "--set training.batch_size=1 --set training.gradient_accumulation=4" in told.stdout


def test_the_rows_of_the_data_count_in_a_plan(tiny_llama_folder, rows):
    done = run("plan", "--model", tiny_llama_folder, "--data", rows, "--preset", "mac-8gb", "--json")
    plan = json.loads(done.stdout)
    assert plan["steps"] > 0
    assert plan["tokens_per_epoch"] > 100
    assert plan["micro_batch"]["width"] < 255


def test_training_that_cannot_fit_is_refused_with_what_to_change(tiny_llama_folder, rows, tmp_path):
    done = run(
        "train", "--model", tiny_llama_folder, "--data", rows, "--adapter-path", tmp_path / "a",
        "--set", "training.memory_budget_gib=0.1", "--json",
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert "may use 0.10 GiB" in done.stderr
    assert "--force" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--memory", "lots"), "no amount of memory"),
        (("--model", "/nowhere/at/all"), "no model folder"),
        ((), "no model"),
    ],
)
def test_a_plan_of_nothing_is_a_clear_error(arguments, said):
    done = run("plan", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
