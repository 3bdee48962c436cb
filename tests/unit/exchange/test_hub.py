import hashlib
import os
from types import SimpleNamespace

import pytest

from mlx_qlora.errors import ConfigError
from mlx_qlora.exchange.card_contents import PublishedFile
from mlx_qlora.exchange.hub import HubError, check_repo_id, license_on_hub, push, read_token
from tests.hub_server import serve

REPO = "ana/farense"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, the client pointed at it, and none of the client's own waits between its attempts."""
    from huggingface_hub import close_session, constants
    from huggingface_hub.utils import _http, disable_progress_bars

    with serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda _seconds: None))
        disable_progress_bars()
        close_session()
        yield hub
        close_session()


@pytest.fixture
def files(tmp_path):
    for name in (FIRST, SECOND):
        (tmp_path / name).write_bytes(os.urandom(300_000))
    made = [PublishedFile(name, tmp_path / name) for name in (FIRST, SECOND)]
    return [
        *made,
        PublishedFile("README.md", b"---\nlicense: mit\n---\n# x\n"),
        PublishedFile("config.json", b"{}"),
    ]


def send(hub, files, **settings):
    return push(REPO, files, **{"token": hub.token, "waits_seconds": (0, 0), **settings})


def test_all_files_arrive_in_one_commit(hub, files):
    done = send(hub, files)
    repository = hub.repositories[REPO]
    assert len(repository.commits) == 2  # the hub's own first one, and ours
    for file in files:
        content = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
        assert repository.files[file.path] == content
    assert done.commit == repository.head
    assert done.bytes == sum(file.num_bytes for file in files)
    assert done.url == f"{hub.url}/{REPO}"
    assert not done.private


def test_the_same_push_again_sends_nothing_and_adds_no_commit(hub, files):
    first = send(hub, files)
    sent = hub.asked("PUT", "/upload/")
    assert send(hub, files).commit == first.commit
    assert hub.asked("PUT", "/upload/") == sent == 2
    assert len(hub.repositories[REPO].commits) == 2


@pytest.mark.parametrize("action", [500, 503, "cut"])
@pytest.mark.parametrize(
    "path",
    ["/upload/", "/preupload/", "/objects/batch", "/commit/", "/repos/create", "/validate-yaml", "/tree/"],
)
def test_what_fails_once_is_done_again(hub, files, path, action):
    fault = hub.fail("GET" if path == "/tree/" else "POST" if path != "/upload/" else "PUT", path, action)
    send(hub, files)
    assert fault.times == 0
    assert set(hub.repositories[REPO].files) >= {file.path for file in files}
    assert len(hub.repositories[REPO].commits) == 2


@pytest.mark.parametrize("action", [500, 503, "cut"])
def test_a_push_that_dies_half_way_changes_nothing_and_is_resumed(hub, files, action):
    before = hub.add(REPO, {"config.json": b"old"}).head
    digest = hashlib.sha256((files[1].content).read_bytes()).hexdigest()
    fault = hub.fail("PUT", digest, action, times=1000)
    with pytest.raises(HubError, match="as it was before") as caught:
        send(hub, files)
    assert caught.value.run.startswith("mlx-qlora push … --repo ana/farense")
    assert hub.repositories[REPO].head == before
    assert hub.repositories[REPO].files["config.json"] == b"old"
    fault.times = 0
    arrived = hashlib.sha256((files[0].content).read_bytes()).hexdigest()
    assert arrived in hub.blobs
    before_resume = hub.asked("PUT", arrived)
    send(hub, files)
    assert hub.asked("PUT", arrived) == before_resume == 1  # what had arrived is not sent again
    assert hub.repositories[REPO].files[SECOND] == files[1].content.read_bytes()
    assert len(hub.repositories[REPO].commits) == 2


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, files):
    fault = hub.fail("POST", "/commit/", "lose")
    done = send(hub, files)
    assert fault.times == 0
    assert len(hub.repositories[REPO].commits) == 2
    assert done.commit == hub.repositories[REPO].head


def test_a_commit_of_somebody_else_in_between_is_built_upon(hub, files):
    repository = hub.add(REPO)
    old = "model-00009-of-00009.safetensors"
    theirs = {"notes.txt": b"theirs", old: b"old"}
    hub.fail("POST", "/commit/", lambda: repository.commit({**repository.files, **theirs}))
    done = send(hub, files)
    assert repository.files["notes.txt"] == b"theirs"
    assert FIRST in repository.files
    assert done.removed == (old,)  # the hub refused the first commit, which knew nothing of this file


def test_weights_of_an_older_push_that_would_be_loaded_too_go_in_the_same_commit(hub, files):
    old = {
        "model-00003-of-00003.safetensors": b"old",
        "model.safetensors.index.json": b"{}",
        "notes.txt": b"kept",
    }
    repository = hub.add(REPO, old)
    done = send(hub, files)
    assert set(done.removed) == {"model-00003-of-00003.safetensors", "model.safetensors.index.json"}
    assert "notes.txt" in repository.files
    assert not set(done.removed) & set(repository.files)
    assert len(repository.commits) == 2


def test_a_private_push_makes_a_private_repository(hub, files):
    assert send(hub, files, private=True).private
    assert hub.repositories[REPO].private


def test_a_private_push_to_a_public_repository_is_refused_before_anything_is_sent(hub, files):
    hub.add(REPO)
    with pytest.raises(HubError, match="everybody can read it"):
        send(hub, files, private=True)
    assert hub.asked("PUT", "/upload/") == 0
    assert len(hub.repositories[REPO].commits) == 1


def test_a_push_to_a_private_repository_stays_private(hub, files):
    hub.add(REPO, private=True)
    assert send(hub, files).private


REFUSALS = {
    "an unknown token": ({"token": "hf_" + "x" * 30}, "does not know this token", "hf auth login"),
    "a token that may only read": ({"token": "hf_" + "r" * 30}, "may not write", "hf auth whoami"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_token_that_will_not_do_is_told(hub, files, case):
    hub.add(REPO)
    settings, said, run = REFUSALS[case]
    with pytest.raises(HubError, match=said) as caught:
        send(hub, files, **settings)
    assert run in caught.value.run
    assert settings["token"] not in str(caught.value)
    assert hub.asked("PUT", "/upload/") == 0


def test_a_repository_of_somebody_else_is_told(hub, files):
    hub.add("rui/farense", {"config.json": b"his"})
    with pytest.raises(HubError, match="belongs to rui"):
        push("rui/farense", files, token=hub.token, waits_seconds=())
    assert hub.repositories["rui/farense"].files["config.json"] == b"his"


@pytest.mark.parametrize(
    ("status", "message"),
    [(403, "Private repository storage limit reached"), (413, "too large"), (402, "pay")],
)
def test_no_room_on_the_hub_is_told(hub, files, status, message):
    hub.fail("POST", "/objects/batch", status, message=message, times=9)
    with pytest.raises(HubError, match="no room left for ana"):
        send(hub, files)


def test_metadata_that_the_hub_refuses_is_told_before_anything_is_sent(hub, files):
    files[2] = PublishedFile("README.md", b"---\nlicense: MINE\n---\n")
    with pytest.raises(HubError, match="license"):
        send(hub, files)
    assert hub.asked("PUT", "/upload/") == 0


def test_no_hub_at_all_is_told(hub, files, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    notes = []
    with pytest.raises(HubError, match="no connection"):
        send(hub, files, on_note=notes.append)
    assert len(notes) == 2


def test_a_file_that_is_gone_is_told_before_anything_is_sent(hub, tmp_path):
    with pytest.raises(HubError, match="cannot be read"):
        send(hub, [PublishedFile("a.txt", b"x"), PublishedFile("b.txt", tmp_path / "gone")])
    assert hub.requests == []


def test_off_line_says_so(hub, files, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        send(hub, files)
    assert hub.requests == []


def test_the_base_models_licence_is_asked_of_the_hub(hub, monkeypatch):
    from huggingface_hub import constants

    hub.add("rui/base", card={"license": "llama3.1", "license_link": "https://example.com/terms"})
    found = license_on_hub("rui/base", hub.token)
    assert (found.id, found.link) == ("llama3.1", "https://example.com/terms")
    assert license_on_hub("rui/nowhere", hub.token) is None
    assert license_on_hub("rui/base", "hf_" + "x" * 30) is None
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert license_on_hub("rui/base", hub.token) is None


@pytest.mark.parametrize("repo", ["farense", "a/b/c", "ana/", "ana/x--y", "ana/fár", "-a/b", "ana/x.git"])
def test_what_is_no_name_on_the_hub_is_refused(repo):
    with pytest.raises(ConfigError, match="--repo"):
        check_repo_id(repo)


def test_a_token_is_read_from_a_file_that_holds_nothing_else(tmp_path):
    path = tmp_path / "token"
    path.write_text("hf_abc\n")
    assert read_token(path) == "hf_abc"
    for wrong in ("", "two words", "HF_TOKEN = hf_abc"):
        path.write_text(wrong)
        with pytest.raises(HubError, match="nothing else"):
            read_token(path)
    with pytest.raises(HubError, match="cannot be read"):
        read_token(tmp_path / "gone")


def test_without_any_token_a_login_is_asked_for(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(HubError, match="no token") as caught:
        read_token(None)
    assert "hf auth login" in caught.value.run
