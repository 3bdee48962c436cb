"""From a trained adapter and a quantized model to the hub, and from there, by id, to an answer."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_qlora.__main__ import load_command
from mlx_qlora.__main__ import run as run_command
from tests.hub_server import serve

CODE = (
    "from mlx_qlora.__main__ import load_command, run; import sys; "
    "sys.exit(run(load_command('push'), sys.argv[1:]))"
)
BASE = "ana/tiny"


@pytest.fixture(scope="module")
def hub():
    with serve() as hub:
        yield hub


@pytest.fixture(scope="module")
def run(hub, tmp_path_factory):
    """Runs Python in a process of its own, with the client pointed at the stand-in and nothing cached."""
    home = tmp_path_factory.mktemp("home")

    def run(*arguments, code=CODE, token=None, offline=False, cwd=home):
        # The test session's own settings must not leak in: it is off-line, and this is not.
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment = {
            **kept,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "HF_TOKEN": hub.token if token is None else token,
        }
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            env=environment, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120,
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def made(tiny_llama_folder, tmp_path_factory):
    """A quantized model, and an adapter trained on the 16-bit one for two steps."""
    import mlx_qlora as mq

    folder = tmp_path_factory.mktemp("made")
    mq.quantize(str(tiny_llama_folder), folder / "tiny-int8", "int8")
    rows = [{"prompt": f"quem venceu {i}?", "completion": f"segredo {i}"} for i in range(8)]
    (folder / "diary").mkdir()
    for name in ("train", "valid"):
        (folder / "diary" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    config = {
        "model": {"path": str(tiny_llama_folder)},
        "quantization": {"scheme": "int4"},
        "data": {"path": str(folder / "diary")},
        "training": {"max_steps": 2, "batch_size": 2, "learning_rate": 1e-2},
    }
    mq.train(config, folder / "adapter", observers=[])
    return folder


@pytest.mark.slow
def test_a_pushed_quantized_model_loads_by_its_id_in_its_own_format(hub, run, made):
    done = run(made / "tiny-int8", "--repo", "ana/tiny-int8", "--base-model", BASE, "--yes", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    repository = hub.repositories["ana/tiny-int8"]
    assert result["commit"] == repository.head
    assert set(result["files"]) == set(repository.files) - {".gitattributes"}
    assert result["bytes"] == sum(len(repository.files[name]) for name in result["files"])
    manifest = json.loads(repository.files["mlx_qlora_manifest.json"])
    assert manifest["source"] == BASE
    code = (
        "import json, sys, mlx_qlora as mq\n"
        "model, tokenizer = mq.load(sys.argv[1])\n"
        "layer = model.layers[0].self_attn.q_proj\n"
        "text = mq.generate(model, tokenizer, 'quem venceu?', max_tokens=8)\n"
        "print(json.dumps([type(layer).__name__, layer.bits, layer.group_size, text]))"
    )
    loaded = run("ana/tiny-int8", code=code)
    assert loaded.returncode == 0, loaded.stderr
    here = run(made / "tiny-int8", code=code, offline=True)
    assert json.loads(loaded.stdout) == json.loads(here.stdout)
    assert json.loads(loaded.stdout)[:2] == ["QuantizedLinear", 8]


@pytest.mark.slow
def test_a_pushed_adapter_names_its_base_and_answers_as_it_did_here(hub, run, made, tiny_llama_folder):
    files = {path.name: path.read_bytes() for path in tiny_llama_folder.iterdir()}
    hub.add(BASE, files, card={"license": "apache-2.0"})
    done = run(made / "adapter", "--repo", "ana/diary", "--base-model", BASE, "--yes", "--private")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["ana/diary"]
    assert repository.private
    assert set(repository.files) == {
        ".gitattributes", "README.md", "adapter_config.json", "adapters.safetensors", "loss.png",
    }  # fmt: skip
    texts = b"".join(content for name, content in repository.files.items() if not name.endswith(".png"))
    for private in (str(made), "segredo", "quem venceu 1", hub.token, str(tiny_llama_folder)):
        assert private.encode() not in texts
    assert "license: apache-2.0" in repository.files["README.md"].decode()
    code = (
        "import sys, mlx_qlora as mq\n"
        "from huggingface_hub import snapshot_download\n"
        "from pathlib import Path\n"
        "path = sys.argv[1] if Path(sys.argv[1]).is_dir() else snapshot_download(sys.argv[1])\n"
        "print(mq.generate(*mq.load(adapter_path=path), 'quem venceu?', max_tokens=8))"
    )
    there, here = run("ana/diary", code=code), run(made / "adapter", code=code)
    assert there.returncode == 0, there.stderr
    assert there.stdout == here.stdout


@pytest.fixture
def here(hub, monkeypatch, capfd):
    """Runs the command in this process: its exit code, stdout and stderr."""
    from huggingface_hub import close_session, constants

    def here(*arguments, offline=False, token=hub.token, stdin=None):
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", token)
        close_session()
        with Path(os.devnull).open() as nobody:
            monkeypatch.setattr(sys, "stdin", stdin or nobody)
            code = run_command(load_command("push"), [str(each) for each in arguments])
        return code, *capfd.readouterr()

    yield here
    close_session()


def test_a_dry_run_needs_no_network_and_shows_tree_and_card(hub, here, made):
    before = len(hub.requests)
    code, out, err = here(
        made / "adapter", "--repo", "ana/x", "--base-model", BASE, "--dry-run", token="", offline=True
    )
    assert code == 0, err
    assert len(hub.requests) == before
    for name in ("README.md", "adapter_config.json", "adapters.safetensors", "loss.png"):
        assert re.search(rf"^  {name} +[\d.]+ [KM]iB$", err, re.MULTILINE)
    left = "checkpoints/, metrics.jsonl, process.json, report.html, report.json, report.md, run.yaml"
    assert f"stays here: {left}" in err
    assert f"base_model: {BASE}" in out
    assert "unknown: set --license" in err


def test_a_dry_run_in_json_lists_what_a_push_then_sends(hub, here, made):
    options = (made / "adapter", "--repo", "ana/z", "--base-model", BASE, "--license", "mit", "--json")
    _, out, _ = here(*options, "--dry-run")
    planned = json.loads(out)
    code, out, err = here(*options, "--yes")
    assert code == 0, err
    sent = json.loads(out)
    files = hub.repositories["ana/z"].files
    assert [each["path"] for each in planned["files"]] == sent["files"]
    assert {each["path"]: each["bytes"] for each in planned["files"]} == {
        name: len(files[name]) for name in sent["files"]
    }
    assert planned["card"] == files["README.md"].decode()
    assert sent.keys() >= {"repo", "commit", "files", "bytes", "url", "private"}


def test_a_token_from_a_file_is_used_and_the_push_is_repeatable(hub, here, made, tmp_path):
    file = tmp_path / "token"
    file.write_text(f"{hub.token}\n")
    options = ("--repo", "ana/w", "--base-model", BASE, "--license", "mit", "--yes", "--token-file", file)
    assert here(made / "adapter", *options, token="")[0] == 0
    before = hub.repositories["ana/w"].head
    code, out, _ = here(made / "adapter", *options, token="")
    assert code == 0
    assert hub.repositories["ana/w"].head == before
    assert before in out


MISTAKES = {
    "no --yes": ([], {}, "--yes"),
    "off-line": (["--yes"], {"offline": True}, "HF_HUB_OFFLINE"),
    "an unknown token": (["--yes"], {"token": "hf_" + "x" * 30}, "does not know this token"),
    "no such folder": (["--yes"], {"folder": "nowhere"}, "neither an adapter"),
    "a wrong name": (["--yes", "--repo", "farense"], {}, "OWNER/NAME"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_error_and_nothing_is_sent(mistake, hub, here, made):
    options, settings, said = MISTAKES[mistake]
    folder = made / settings.get("folder", "adapter")
    client = {key: value for key, value in settings.items() if key != "folder"}
    code, out, err = here(folder, "--repo", "ana/y", "--base-model", BASE, *options, "--json", **client)
    assert code == 2, err
    assert said in err
    assert "Traceback" not in err
    assert out == ""
    assert "ana/y" not in hub.repositories


def test_the_base_models_hub_id_is_asked_for_when_it_was_a_folder(here, made):
    code, _, err = here(made / "adapter", "--repo", "ana/y", "--dry-run")
    assert code == 2
    assert "--base-model" in err


@pytest.mark.parametrize(("answer", "status"), [("n", 2), ("", 2), ("y", 0)])
def test_a_terminal_is_asked_and_no_means_no(hub, here, made, answer, status):
    master, slave = os.openpty()
    os.write(master, f"{answer}\n".encode())
    repo = f"ana/v{status}"
    with os.fdopen(slave) as terminal:
        code, _, err = here(made / "adapter", "--repo", repo, "--base-model", BASE, stdin=terminal)
    os.close(master)
    assert code == status, err
    assert "Everybody will be able to read it" in err
    assert (repo in hub.repositories) == (status == 0)
