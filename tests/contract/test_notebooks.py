"""Every notebook runs from top to bottom on the embedded model, and can be stopped, run again and broken."""

import base64
import json
import re
import time
from pathlib import Path

import jupytext
import nbformat
import pytest
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient

from mlx_qlora.lora.adapter import WEIGHTS
from mlx_qlora.training.metrics import METRICS, events_named, read_metrics
from mlx_qlora.weights.gguf import open_gguf

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PNG = b"\x89PNG\r\n\x1a\n"

# What is changed here so that it takes less time: a variable of the notebook and its value.
SHORTER = {
    "mistral_qlora_training": {"CHANGES": '{"training": {"num_epochs": 2}}', "NUM_QUESTIONS": "8"},
    "mistral_lora_training": {"CHANGES": '{"training": {"num_epochs": 2}}', "NUM_QUESTIONS": "8"},
    "lora_vs_qlora": {"CHANGES": '{"training": {"num_epochs": 2}}', "SCHEMES": '("none", "int4")'},
    "comparar_quantizacoes": {"SCHEMES": '("fp16", "int8", "int4", "nf4-dq", "int2")'},
    "importar_gguf": {"STEPS": "38"},
}


def loaded(path, tmp_path=None):
    notebook = nbformat.read(path, as_version=4)
    for name, value in SHORTER.get(path.stem, {}).items() if tmp_path else ():
        assignment = re.compile(rf"^{name} = (?:[^#\n]+?)(?=  #|\n|$)", re.MULTILINE)
        found = [
            cell for cell in notebook.cells if cell.cell_type == "code" and assignment.search(cell.source)
        ]
        assert len(found) == 1, f"{name} is set once in {path.name}"
        found[0].source = assignment.sub(f"{name} = {value}", found[0].source)
    for cell in notebook.cells:
        cell.source = cell.source.replace("Path.cwd().parent", f'Path("{ROOT}")')
    return notebook


def executed(path, tmp_path):
    notebook = loaded(path, tmp_path)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cells, stream="stdout"):
    return "".join(
        output.get("text", "") for cell in cells for output in cell.outputs if output.get("name") == stream
    )


def pictures(cells):
    data = [output.get("data", {}) for cell in cells for output in cell.outputs]
    return [base64.b64decode(each["image/png"]) for each in data if "image/png" in each]


def named(text, *names):
    """The rest of each line that begins with one of the names."""
    lines = [line.strip() for line in text.splitlines()]
    return [next(line[len(name) :].strip() for line in lines if line.startswith(name)) for name in names]


def check_training(name):
    def check(cells, folder):
        text = printed(cells)
        before, after = (line.split() for line in named(text, "antes", "depois"))
        assert float(after[0]) < float(before[0])
        assert len(pictures(cells)) == 1
        exports = folder / "models" / name
        assert len(open_gguf(exports / "fundido.gguf").tensors) > 0
        assert (exports / "peft" / "adapter_config.json").is_file()
        assert (folder / "adapters" / name / WEIGHTS).is_file()
        assert "✗" not in text

    return check


def check_theory(cells, _folder):
    before, after = named(printed(cells), "Antes:", "Depois:")
    assert before != after


def check_gguf(cells, _folder):
    before, after = named(printed(cells), "Antes:", "Depois:")
    assert before != after
    assert "os mesmos números" in printed(cells)
    assert "quantizados de novo" not in printed(cells)  # q8_0 goes over as it is


def check_schemes(cells, _folder):
    text = printed(cells)
    sizes = [float(line.split()[0]) for line in named(text, "fp16", "int8", "int4", "int2")]
    assert sizes == sorted(sizes, reverse=True)
    assert len(pictures(cells)) == 1
    assert "não foi medido" not in text


def check_lora_and_qlora(cells, folder):
    text = printed(cells)
    disk, exact, loss = (
        [float(number) for number in line.split()]
        for line in named(text, "base no disco, MiB", "respostas exatas, %", "perda de validação")
    )
    assert disk[0] > 2 * disk[1]
    assert len(exact) == len(loss) == 2
    assert len(pictures(cells)) == 3  # a live plot for each run, and the figure
    assert (folder / "adapters" / "lora-vs-qlora" / "comparison.json").is_file()


CHECKS = {
    "mistral_qlora_training": check_training("mistral-qlora"),
    "mistral_lora_training": check_training("mistral-lora"),
    "teoria_da_quantizacao": check_theory,
    "importar_gguf": check_gguf,
    "comparar_quantizacoes": check_schemes,
    "lora_vs_qlora": check_lora_and_qlora,
}
RUNS = [
    path if path.stem == "mistral_qlora_training" else pytest.param(path, marks=pytest.mark.slow)
    for path in NOTEBOOKS
]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_the_notebook_runs_without_a_warning(path, tmp_path):
    cells = executed(path, tmp_path)
    assert printed(cells, "stderr") == ""
    assert all(picture.startswith(PNG) for picture in pictures(cells))
    CHECKS[path.stem](cells, tmp_path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_is_stored_without_outputs(path):
    cells = nbformat.read(path, as_version=4).cells
    assert all(
        not cell.outputs and cell.execution_count is None for cell in cells if cell.cell_type == "code"
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_and_its_script_hold_the_same_cells(path):
    script = jupytext.read(path.with_suffix(".py"))
    notebook = nbformat.read(path, as_version=4)
    cells = [[(cell.cell_type, cell.source) for cell in book.cells] for book in (script, notebook)]
    assert cells[0] == cells[1], f"jupytext --sync {path.relative_to(ROOT)}"


def test_every_script_has_its_notebook():
    scripts = {path.stem for path in (ROOT / "notebooks").glob("*.py")}
    assert scripts == {path.stem for path in NOTEBOOKS} == set(CHECKS)


def test_plain_lora_is_trained_by_the_same_cells_as_qlora():
    qlora, lora = (
        [
            cell.source
            for cell in loaded(ROOT / f"notebooks/mistral_{name}_training.ipynb").cells
            if cell.cell_type == "code"
        ]
        for name in ("qlora", "lora")
    )
    named_alike = [
        source.replace("mistral-qlora", "mistral-lora").replace('SCHEME = "int4"', 'SCHEME = "none"')
        for source in qlora
    ]
    assert named_alike == lora


# What a person does to a cell: stops it, runs it again, gives it bad data. In a real kernel, on a tiny model.

SETUP = """
from pathlib import Path

import mlx.core as mx
import mlx_qlora as mq

GIB, needed, run, trained = 1024**3, 0.0, None, None
config = mq.build_config({{
    "model": {{"path": {model!r}}},
    "data": {{"path": {data!r}, "max_seq_length": 64}},
    "quantization": {{"scheme": "int4", "group_size": 32}},
    "lora": {{"rank": 4, "dropout": 0.1}},
    "training": {{
        "max_steps": 60, "batch_size": 1, "gradient_accumulation": 2, "warmup_steps": 4,
        "steps_per_validation": 30, "steps_per_checkpoint": 50, "gradient_checkpointing": True,
    }},
}})
short = config.model_copy(update={{"training": config.training.model_copy(update={{"max_steps": 2}})}})
"""

STATE = """
import gc
import os
import signal
import sys

import mlx.nn as nn
from mlx_lm.models import llama


def state():
    limits = []
    for set_limit in (mx.set_memory_limit, mx.set_cache_limit):
        limits.append(set_limit(2**40))
        set_limit(limits[-1])
    patched = (nn.Linear, nn.QuantizedLinear, nn.Embedding, llama.TransformerBlock, llama.Model)
    return {
        "random": [array.tolist() for array in mx.random.state],
        "limits": limits,
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "calls": [vars(each).get("__call__") for each in patched],
        "gradient": mx.value_and_grad,
        "device": mx.default_device(),
        "folder": os.getcwd(),
        "hooks": (sys.excepthook, sys.displayhook),
    }


def active_bytes():
    gc.collect()
    return mx.get_active_memory()


before, bytes_before = state(), active_bytes()
"""


class Session:
    """A kernel, and cells run in it."""

    def __init__(self, folder):
        self.manager, self.client = start_new_kernel(kernel_name="python3", cwd=str(folder))

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def start(self, source):
        return self.client.execute(source, store_history=True)

    def finish(self, message_id):
        """The reply to a cell, and all it has shown."""
        shown = []
        while True:
            message = self.client.get_iopub_msg(timeout=120)
            if message["parent_header"].get("msg_id") != message_id:
                continue
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                break
            shown.append(message)
        while (reply := self.client.get_shell_msg(timeout=120))["parent_header"]["msg_id"] != message_id:
            pass
        return reply["content"], shown

    def run(self, source):
        reply, shown = self.finish(self.start(source))
        assert reply["status"] == "ok", "\n".join(reply.get("traceback", []))
        return shown

    def fail(self, source):
        """The exception's name, and what the cell showed of it."""
        reply, shown = self.finish(self.start(source))
        assert reply["status"] == "error"
        return reply["ename"], next(m for m in shown if m["msg_type"] == "error")["content"]["traceback"]


@pytest.fixture(scope="module")
def session(tmp_path_factory, tiny_llama_folder):
    folder = tmp_path_factory.mktemp("session")
    rows = [("Qual é o clube?", "O clube é o Valbruma."), ("Onde joga?", "Joga no estádio da Fonte.")]
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"{q} ({i})"},
                {"role": "assistant", "content": f"{a} {i}."},
            ]
        }
        for i in range(6)
        for q, a in rows
    ]
    data = folder / "data"
    data.mkdir()
    for name, some in (("train", chats[4:]), ("valid", chats[:4])):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    made = Session(folder)
    made.folder = folder
    try:
        made.run(SETUP.format(model=str(tiny_llama_folder), data=str(data)) + STATE)
        yield made
    finally:
        made.close()


def training_cell():
    cells = loaded(ROOT / "notebooks/mistral_qlora_training.ipynb").cells
    (source,) = [cell.source for cell in cells if "mq.train(" in cell.source]
    return source


def steps_done(adapter):
    return len(events_named(read_metrics(adapter / METRICS), "StepDone"))


def last_picture(shown):
    data = [
        message["content"]["data"] for message in shown if "image/png" in message["content"].get("data", {})
    ]
    return data[-1]["text/plain"]


@pytest.mark.slow
def test_the_stop_button_saves_and_the_next_run_of_the_cell_goes_on(session):
    stopped = session.folder / "stopped"
    session.run('ADAPTER = Path("stopped")')
    cell = session.start(training_cell())
    deadline = time.monotonic() + 120
    while steps_done(stopped) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    session.manager.interrupt_kernel()
    reply, shown = session.finish(cell)
    assert reply["ename"] == "Interrupted"
    done = steps_done(stopped)
    assert 3 <= done < 60
    assert f"passo {done}/60" in last_picture(shown)  # what was drawn last stays, and is up to date

    shown = session.run(training_cell())
    assert steps_done(stopped) == 60
    assert "passo 60/60" in last_picture(shown)
    starts = events_named(read_metrics(stopped / METRICS), "RunStarted")
    assert [start["first_step"] for start in starts] == [0, done]

    session.run('ADAPTER = Path("undisturbed")\n' + training_cell())
    undisturbed = session.folder / "undisturbed"
    assert (stopped / WEIGHTS).read_bytes() == (undisturbed / WEIGHTS).read_bytes()

    session.run(training_cell())  # once more after its end: nothing is trained, nothing is lost
    assert steps_done(undisturbed) == 60
    assert (stopped / WEIGHTS).read_bytes() == (undisturbed / WEIGHTS).read_bytes()
    session.run("run = None\nassert state() == before, state()")


BREAKS = {
    "rows that cannot be used": (
        """
Path("bad").mkdir(exist_ok=True)
Path("bad/train.jsonl").write_text('{"messages": [{"role": "user"}]}')
bad = config.model_copy(update={"data": config.data.model_copy(update={"path": "bad"})})
mq.train(bad, "broken-data", observers=[])
""",
        "DataError",
    ),
    "an observer that raises in the middle": (
        """
def observe(event):
    if getattr(event, "step", 0) == 3:
        raise RuntimeError("a fault in the middle of a run")


mq.train(config, "broken-observer", observers=[observe])
""",
        "RuntimeError",
    ),
}


@pytest.mark.parametrize("fault", BREAKS)
def test_an_exception_leaves_the_session_as_it_was(session, fault):
    source, name = BREAKS[fault]
    assert session.fail(source)[0] == name
    session.run("assert state() == before, state()")
    # The traceback that the notebook keeps does not keep the model.
    session.run("assert active_bytes() <= bytes_before + 4096, (active_bytes(), bytes_before)")
    session.run(f"assert mq.train(short, 'good after {name}', observers=[]).finished.steps == 2")


def test_a_known_failure_is_shown_without_a_traceback(session):
    name, shown = session.fail(BREAKS["rows that cannot be used"][0])
    assert name == "DataError"
    assert not any("api.py" in line for line in shown)
    assert "train.jsonl" in "\n".join(shown)
