"""Ranks that share one model answer as one process does, and no fault of any of them is a hang."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import mlx.core as mx
import numpy as np
import psutil
import pytest
from mlx.utils import tree_flatten

from mlx_qlora.commands.infer_rank import COMMAND
from mlx_qlora.config import QuantizationConfig
from mlx_qlora.errors import AdapterError, MlxQloraError
from mlx_qlora.inference.generate import Sampling, load_assistant
from mlx_qlora.inference.sharded_question import Question
from mlx_qlora.inference.sharded_watch import RankError, SharedAnswer
from mlx_qlora.training.distributed_messages import Connection
from mlx_qlora.training.launcher import HostsLauncher, LocalLauncher, Place
from tests.sharded import PROMPT, save_adapter_of, save_model, spread

pytestmark = pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="this MLX has no ring")

NOTICED_SECONDS = 15
INFER = (
    "import sys; from mlx_qlora.__main__ import load_command, run; "
    "sys.exit(run(load_command('infer'), sys.argv[1:]))"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def llama(folder):
    """With biases everywhere, those of layers that are summed over ranks included."""
    return save_model(folder / "llama", attention_bias=True, mlp_bias=True)


@pytest.fixture(scope="module")
def qwen2(folder):
    """Of an architecture that has both shardings."""
    return save_model(folder / "qwen2", model_type="qwen2", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def wide(folder):
    """Large enough that MLX cuts off what is not needed; it keeps up to 16 KiB more than that of an array."""
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12}
    return save_model(folder / "wide", num_hidden_layers=2, num_key_value_heads=4, **sizes)


@pytest.fixture(scope="module")
def adapter(folder, llama):
    return save_adapter_of(llama, folder / "adapter")


def alone(scheme="none", **options):
    """The model of one process."""
    return load_assistant(**options, quantization=QuantizationConfig(scheme=scheme)).model


def assert_agrees(found, model):
    """Logits to 1e-5 of the largest, on every rank."""
    expected = np.array(model(mx.array([PROMPT])))
    for path in found:
        error = np.abs(np.load(path)["logits"] - expected).max() / np.abs(expected).max()
        assert error < 1e-5, (path.name, error)


@pytest.fixture(scope="module")
def on_two(folder, llama, qwen2, wide, adapter):
    """What two ranks make of several models, by name: the options, and a file for each rank."""
    cases = {
        "plain": {"model": llama},
        "int4": {"model": llama, "scheme": "int4"},
        "adapter": {"model": llama, "adapter_path": adapter},
        "adapter-int4": {"model": llama, "adapter_path": adapter, "scheme": "int4"},
        "pipeline": {"model": qwen2, "scheme": "int4", "sharding": "pipeline"},
        "qwen2": {"model": qwen2},
        "wide": {"model": wide},
        "wide-int4": {
            "model": wide,
            "scheme": "int4",
            "adapter_path": save_adapter_of(wide, folder / "wide-adapter"),
        },
    }
    found = spread(folder / "two", 2, cases)
    return {
        name: (
            {key: str(value) for key, value in case.items() if key != "sharding"},
            [path for path in found if path.name.rpartition("-")[0] == name],
        )
        for name, case in cases.items()
    }


@pytest.mark.parametrize("name", ["plain", "int4", "adapter", "adapter-int4", "pipeline", "qwen2"])
def test_the_logits_of_two_ranks_are_those_of_one_process(name, on_two):
    options, found = on_two[name]
    assert len(found) == 2
    assert {str(np.load(path)["sharding"]) for path in found} == {
        "pipeline" if name == "pipeline" else "tensor"
    }
    assert_agrees(found, alone(**options))


@pytest.mark.parametrize("name", ["wide", "wide-int4"])
def test_no_rank_holds_much_more_than_its_half_and_none_ever_the_whole(name, on_two):
    options, found = on_two[name]
    model = alone(**options)
    arrays = [array for _, array in tree_flatten(model.parameters())]
    whole, largest = sum(a.nbytes for a in arrays), max(a.nbytes for a in arrays)
    for path in found:
        held, peak = (int(np.load(path)[key]) for key in ("held", "peak"))
        assert held <= 0.6 * whole
        assert peak <= held + 2 * largest + 256 * 1024 < whole


class Rigged(LocalLauncher):
    """Ranks that write down their process ids, and one that does something else first."""

    def __init__(self, ranks, folder, *, rank=None, code=""):
        self.folder = folder
        begin = (
            "import os, pathlib, signal, sys, time\n"
            f"folder = pathlib.Path({str(folder)!r})\n"
            "(folder / f'pid-{os.environ[\"MLX_RANK\"]}').write_text(str(os.getpid()))\n"
        )
        end = "from mlx_qlora.commands.infer_rank import main\nsys.exit(main())\n"
        scripts = [begin + (code if number == rank else "") + end for number in range(ranks)]
        super().__init__(ranks, commands=[(sys.executable, "-c", script) for script in scripts])

    def pid(self, rank):
        return int((self.folder / f"pid-{rank}").read_text())

    def send(self, rank, number):
        os.kill(self.pid(rank), number)


def assert_nobody_is_left(folder):
    for path in folder.glob("pid-*"):
        assert not is_running(int(path.read_text())), f"{path.name} is still there"


def question(model, **sampling):
    return Question(
        messages=[{"role": "user", "content": "Quem fundou o clube?"}],
        model=str(model),
        sampling=Sampling(**{"max_tokens": 12, **sampling}),
    )


@pytest.mark.slow
def test_a_sampled_answer_of_two_ranks_is_one_answer_and_its_seed_repeats_it(llama, tmp_path):
    sampling = {"temperature": 1.5, "seed": 7, "max_tokens": 16}
    launcher = Rigged(2, tmp_path)
    shared = SharedAnswer(question(llama, **sampling), launcher, Connection)
    pieces = list(shared.stream())
    answer = pieces[-1][1]
    assert "".join(piece for piece, _ in pieces) == answer.text
    here = load_assistant(str(llama)).ask("Quem fundou o clube?", sampling=Sampling(**sampling))
    assert (answer.text, answer.prompt_tokens) == (here.text, here.prompt_tokens)
    assert [report.sharding for report in shared.reports] == ["tensor", "tensor"]
    assert_nobody_is_left(tmp_path)


@pytest.mark.slow
def test_a_rank_with_another_opinion_and_another_prompt_follows_rank_0(llama, tmp_path):
    other = (
        "from mlx_qlora.inference.generate import Assistant\n"
        "Assistant.prompt = lambda *_args, **_options: [3] * 99\n"
        "import mlx.core as mx\nfrom mlx_lm import sample_utils\n"
        "sample_utils.make_sampler = lambda **_: lambda logprobs: mx.argmin(logprobs, axis=-1)\n"
    )
    launcher = Rigged(2, tmp_path, rank=1, code=other)
    answer = list(SharedAnswer(question(llama), launcher, Connection).stream())[-1][1]
    assert (
        answer.text
        == load_assistant(str(llama)).ask("Quem fundou o clube?", sampling=Sampling(max_tokens=12)).text
    )


def fails(model, launcher, act=None, **sampling):
    """The error of an answer, and seconds: from the third token, where `act` is called, or the last."""
    shared = SharedAnswer(question(model, **{"max_tokens": 400, **sampling}), launcher, Connection)
    began, count = time.monotonic(), 0
    try:
        for _piece in shared.stream():
            count += 1
            if act is None or count == 3:
                began = time.monotonic()
            if act is not None and count == 3:
                act()
    except MlxQloraError as error:
        return error, time.monotonic() - began
    raise AssertionError("the ranks came to an answer")


ENDLESS = (  # a random model may end its turn at once
    "from mlx_lm.tokenizer_utils import TokenizerWrapper\n"
    "TokenizerWrapper.eos_token_ids = property(lambda self: set(), lambda self, ids: None)\n"
    "import mlx_lm.generate\ngenerate = sys.modules['mlx_lm.generate']\nstep = generate.generate_step\n"
    "def slowly(*args, **kwargs):\n"
    "    for each in step(*args, **kwargs):\n"
    "        time.sleep(0.05)\n"
    "        yield each\n"
    "generate.generate_step = slowly\n"
)


class Endless(Rigged):
    """All ranks go on for long."""

    def __init__(self, ranks, folder):
        super().__init__(ranks, folder)
        self._commands = [
            (*command[:2], command[2].replace("from mlx_qlora.commands", ENDLESS + "from mlx_qlora.commands"))
            for command in self._commands
        ]


def test_a_killed_rank_ends_the_answer_with_an_error_that_names_it(llama, tmp_path):
    launcher = Endless(2, tmp_path)
    error, seconds = fails(llama, launcher, lambda: launcher.send(1, signal.SIGKILL))
    assert isinstance(error, RankError)
    assert "rank 1 ended without a word (signal 9)" in error.what
    assert seconds < NOTICED_SECONDS
    assert_nobody_is_left(tmp_path)


@pytest.mark.slow
def test_a_stopped_rank_is_noticed(llama, tmp_path):
    launcher = Endless(2, tmp_path)
    error, seconds = fails(llama, launcher, lambda: launcher.send(1, signal.SIGSTOP))
    assert "rank 1 gave no sign of life" in error.what
    assert seconds < NOTICED_SECONDS
    assert_nobody_is_left(tmp_path)


@pytest.mark.slow
def test_ranks_that_mlx_launch_starts_answer_alike_and_a_killed_one_is_noticed(llama, tmp_path):
    here = Place("127.0.0.1", "127.0.0.1")
    shared = SharedAnswer(question(llama), HostsLauncher([here, here], command=COMMAND), Connection)
    answer = list(shared.stream())[-1][1]
    sampling = Sampling(max_tokens=12)
    assert answer.text == load_assistant(str(llama)).ask("Quem fundou o clube?", sampling=sampling).text

    launcher = Endless(2, tmp_path)
    script = tmp_path / "rank.py"
    script.write_text("import os, sys\nsys.path.insert(0, os.getcwd())\n" + launcher._commands[0][2])
    hosts = HostsLauncher([here, here], command=(sys.executable, str(script)))
    error, seconds = fails(llama, hosts, lambda: launcher.send(1, signal.SIGKILL))
    assert "rank 1 ended without a word" in error.what
    assert seconds < NOTICED_SECONDS
    until = time.monotonic() + 5  # the other is no child of ours: it ends as its connection does
    while time.monotonic() < until and any(psutil.pid_exists(launcher.pid(rank)) for rank in (0, 1)):
        time.sleep(0.05)
    assert_nobody_is_left(tmp_path)


HANGS = (
    "import mlx_lm.generate\ngenerate = sys.modules['mlx_lm.generate']\nstep = generate.generate_step\n"
    "def hanging(*args, **kwargs):\n"
    "    for count, each in enumerate(step(*args, **kwargs)):\n"
    "        if count == 3: time.sleep(1000)\n"
    "        yield each\n"
    "generate.generate_step = hanging\n"
)
NEVER_JOINS = (
    "from mlx_qlora.inference import sharded_rank\n"
    "joined = sharded_rank.RankProcess._joined\n"
    "sharded_rank.RankProcess._joined = lambda self: time.sleep(1000)\n"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("time.sleep(1000)\n", "rank 1 did not start"),
        ("os.abort()\n", "rank 1 ended without a word (signal 6)"),
        (NEVER_JOINS, "rank 1 did not join"),
        (HANGS, "no token came"),
    ],
    ids=["never-starts", "dies", "never-joins", "hangs-alive"],
)
def test_what_a_rank_can_do_wrong_is_noticed(code, said, llama, tmp_path):
    error, seconds = fails(llama, Rigged(2, tmp_path, rank=1, code=code))
    assert said in error.what
    assert seconds < NOTICED_SECONDS + 5  # starting Python is in it
    assert_nobody_is_left(tmp_path)


def infer(*arguments):
    """The command's exit code, standard output and error."""
    process = subprocess.run(
        [sys.executable, "-c", INFER, "Quem fundou o clube?", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return process.returncode, process.stdout, process.stderr


def test_the_command_answers_as_one_process_with_an_adapter_on_a_quantized_base(adapter):
    sampling = {"max_tokens": 16, "temperature": 1.5, "seed": 7}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in sampling.items()]
    code, out, err = infer(
        "--adapter-path", adapter, "--scheme", "int4", "--processes", 2, "--json", *options
    )
    assert code == 0, err
    answer = json.loads(out)
    assistant = load_assistant(adapter_path=adapter, quantization=QuantizationConfig(scheme="int4"))
    here = assistant.ask("Quem fundou o clube?", sampling=Sampling(**sampling))
    assert answer["text"] == here.text
    assert answer["generation_tokens"] == here.generation_tokens
    assert answer["finish_reason"] == here.finish_reason
    assert [rank["sharding"] for rank in answer["ranks"]] == ["tensor", "tensor"]


@pytest.mark.slow
def test_only_rank_0_is_heard_and_only_the_answer_is_on_standard_output(llama):
    code, out, err = infer("--model", llama, "--processes", 2, "--max-tokens", 8)
    here = load_assistant(str(llama)).ask("Quem fundou o clube?", sampling=Sampling(max_tokens=8))
    assert (code, out) == (0, here.text + "\n")
    assert [line[:6] for line in err.splitlines() if line.startswith("rank")] == ["rank 0", "rank 1"]


def test_an_adapter_that_reads_whole_weights_is_refused_before_any_rank_is_started(llama, tmp_path):
    adapter = save_adapter_of(llama, tmp_path / "dora", variant="dora", target_modules=("q_proj",))
    with pytest.raises(AdapterError, match="DoRA") as failed:
        SharedAnswer(replace(question(llama), adapter_path=adapter), Rigged(2, tmp_path), Connection)
    assert failed.value.run.startswith(f"mlx-qlora fuse --adapter-path {adapter} --output DIR")
    assert not list(tmp_path.glob("pid-*"))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["none", "int4"])
def test_the_process_of_a_rank_never_holds_the_whole(scheme, wide, tmp_path):
    asked = replace(question(wide, max_tokens=2), quantization=QuantizationConfig(scheme=scheme))
    shared = SharedAnswer(asked, Rigged(2, tmp_path), Connection)
    assert list(shared.stream())
    arrays = tree_flatten(alone(scheme, model=str(wide)).parameters())
    whole = sum(array.nbytes for _, array in arrays)
    for report in shared.reports:
        assert report.weights_bytes <= 0.6 * whole
        assert report.peak_memory_bytes <= 0.85 * whole


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_pipeline_answers_as_one_process(ranks, qwen2, tmp_path):
    asked = replace(question(qwen2), sharding="pipeline")
    shared = SharedAnswer(asked, Rigged(ranks, tmp_path), Connection)
    answer = list(shared.stream())[-1][1]
    sampling = Sampling(max_tokens=12)
    assert answer.text == load_assistant(str(qwen2)).ask("Quem fundou o clube?", sampling=sampling).text
    assert [report.sharding for report in shared.reports] == ["pipeline"] * ranks
    assert_nobody_is_left(tmp_path)


@pytest.mark.slow
def test_four_ranks_give_the_logits_of_one(folder):
    model = save_model(folder / "four", num_key_value_heads=4, attention_bias=True)
    adapter = save_adapter_of(model, folder / "four-adapter")
    case = {"model": model, "adapter_path": adapter, "scheme": "int4"}
    found = spread(folder / "on-four", 4, {"four": case})
    assert len(found) == 4
    assert_agrees(found, alone(**{name: str(value) for name, value in case.items()}))


@pytest.mark.slow
def test_ranks_with_other_weights_are_refused(llama, tmp_path):
    code = "from mlx_qlora.weights import loader\nloader.source_fingerprint = lambda folder: 'another'\n"
    error, _ = fails(llama, Rigged(2, tmp_path, rank=1, code=code))
    assert "weights: on rank 1 it is not rank 0's" in error.what
    assert_nobody_is_left(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--processes", 3), "3 ranks cannot share evenly"),
        pytest.param(
            ("--processes", 2, "--sharding", "pipeline"),
            "mlx-lm cannot spread llama over ranks by pipeline",
            marks=pytest.mark.slow,
        ),
        pytest.param(("--sharding", "tensor"), "no sharding tensor of one process", marks=pytest.mark.slow),
        pytest.param(("--processes", 2, "--offload"), "--offload is for one", marks=pytest.mark.slow),
    ],
)
def test_a_mistake_is_said_once_with_exit_code_2(options, said, llama):
    code, out, err = infer("--model", llama, *options)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_ctrl_c_ends_all_ranks(number, code, llama):
    process = subprocess.Popen(
        [sys.executable, "-c", INFER, "Quem?", "--model", str(llama), "--processes", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    ranks = wait_for_ranks(process.pid, 2)
    process.send_signal(number)
    _, err = process.communicate(timeout=NOTICED_SECONDS)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert not [rank for rank in ranks if is_running(rank)]


def is_running(pid):
    """A killed orphan has a number until init looks at it."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for_ranks(parent, count):
    until = time.monotonic() + 30
    while time.monotonic() < until:
        ranks = [
            child.pid
            for child in psutil.Process(parent).children()
            if "infer_rank" in " ".join(child.cmdline())
        ]
        if len(ranks) == count:
            return ranks
        time.sleep(0.05)
    raise TimeoutError(f"no {count} ranks")
