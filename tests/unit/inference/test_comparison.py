"""inference/comparison.py and comparison_figure.py"""

import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_qlora.errors import ConfigError, DataError, ModelError
from mlx_qlora.inference import comparison, comparison_figure, worker
from mlx_qlora.inference.comparison import FLOAT_NAMES, Comparison, Request, Row, compare
from mlx_qlora.inference.comparison_figure import check_figure, save_figure
from mlx_qlora.inference.comparison_worker import Measured
from mlx_qlora.quantization.schemes import SCHEMES

MEASURED = Measured(
    load_seconds=0.1,
    tokens_per_second=100.0,
    peak_footprint_bytes=10**8,
    mlx_peak_bytes=10**7,
    loss_nats=2.0,
    divergence_nats=0.0,
    agreement=1.0,
    target_tokens=50,
    split="test",
    num_rows=5,
    exact_match=None,
    num_questions=0,
    dtype="float32",
)


def row(scheme, bits=4.5, divergence=0.01, loss=2.01, **changes):
    """A row as if it had been measured: for what is made of figures, not for figures."""
    measured = replace(MEASURED, divergence_nats=divergence, loss_nats=loss)
    return replace(
        Row(scheme=scheme, bytes_on_disk=10**6, bits_per_weight=bits, measured=measured), **changes
    )


def compared(*rows):
    first = replace(row("fp16", bits=16.0, divergence=0.0, loss=2.0), is_reference=True)
    return Comparison(model="m", data="d", num_parameters=10**6, rows=(first, *rows))


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "quem?", "completion": "o clube"}\n')
    return {"path": str(file)}


def refused(model, data, *schemes, **keys):
    with pytest.raises((ConfigError, DataError, ModelError)) as caught:
        compare(Request(model=str(model), schemes=schemes, data=data, **keys))
    return str(caught.value)


def test_all_schemes_that_do_not_exist_are_named_before_anything_is_measured(tiny_llama_folder, data):
    said = refused(tiny_llama_folder, data, "int8", "int7", "nf5", "int4-g16")
    assert "3 scheme(s)" in said
    assert "'int7'" in said
    assert "'nf5'" in said
    assert "groups of 32, 64, 128, not 16" in said
    assert "--schemes fp16,int8" in said


def test_no_scheme_is_refused(tiny_llama_folder, data):
    assert "no scheme" in refused(tiny_llama_folder, data)


def test_a_reference_that_does_not_exist_is_refused(tiny_llama_folder, data):
    assert "'in8'" in refused(tiny_llama_folder, data, "int8", reference="in8")


def test_data_that_is_not_there_is_refused_before_the_model_is_looked_at(tmp_path):
    assert "no such file" in refused(tmp_path / "no-model", {"path": str(tmp_path / "no.jsonl")}, "int8")


def test_a_quantized_model_is_refused_with_what_to_do(tiny_llama_folder, data, tmp_path):
    import mlx_qlora as mq

    mq.quantize(str(tiny_llama_folder), tmp_path / "int8", "int8")
    assert "quantized already" in refused(tmp_path / "int8", data, "int4")


def test_every_float_name_is_the_checkpoint_as_it_is_and_no_name_of_a_format():
    assert all(scheme is None for scheme in comparison._read_schemes([*FLOAT_NAMES, "none"]).values())
    assert not set(FLOAT_NAMES) & set(SCHEMES)
    schemes = comparison._read_schemes([*SCHEMES, "int4-g32", "none"])
    assert schemes["int4-g32"].group_size == 32
    assert all(schemes[name] == SCHEMES[name] for name in SCHEMES)


def test_the_change_of_perplexity_is_a_ratio():
    found = compared(row("int8", loss=2.01), row("int4", loss=1.99))
    before, up, down = (found.perplexity_change(each) for each in found.rows)
    assert before == 0
    assert up == pytest.approx(math.exp(2.01) / math.exp(2.0) - 1)
    assert -0.01 < down < 0
    failed = Row(scheme="nvfp4", problem="why")
    assert found.perplexity_change(failed) is None
    assert found.rows[1].perplexity == pytest.approx(math.exp(2.01))


def test_as_json_every_row_has_the_same_reading_whether_measured_or_not():
    rows = compared(row("int8"), Row(scheme="nvfp4", problem="why")).as_dict()["rows"]
    assert rows[1]["divergence_nats"] == 0.01
    assert rows[1]["problem"] is None
    assert (rows[2]["problem"], rows[2]["perplexity"], rows[2]["perplexity_change"]) == ("why", None, None)


def test_a_killed_worker_is_said_to_have_run_out_of_memory_and_a_crash_shows_its_last_lines():
    assert "memory" in worker.death(-signal.SIGKILL, "")
    assert "signal 11" in worker.death(-signal.SIGSEGV, "")
    said = worker.death(1, "\n".join(f"line {n}" for n in range(9)))
    assert "exit code 1" in said
    assert "line 8" in said
    assert "line 5" not in said


def test_folders_of_comparisons_that_were_killed_are_swept_and_those_that_run_are_not(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_QLORA_CACHE", str(tmp_path))
    ended = os.spawnlp(os.P_NOWAIT, "true", "true")
    os.waitpid(ended, 0)
    for owner in (ended, os.getppid()):
        (tmp_path / f".compare-{owner}.tmp").mkdir()
    with comparison._work_folder() as work:
        assert sorted(tmp_path.iterdir()) == sorted([tmp_path / f".compare-{os.getppid()}.tmp", work])
    assert not work.exists()


def test_a_figure_shows_every_measured_format_but_the_reference(tmp_path):
    from matplotlib.figure import Figure

    found = compared(
        row("int8", 8.5, 1e-5),
        row("mxfp4", 4.25, 0.02),
        row("nf4-dq", 4.13, 0.03),
        Row(scheme="int2", problem="why"),
    )
    panel = Figure().subplots()
    comparison_figure._draw(panel, found)
    labels = " ".join(text.get_text() for text in panel.texts)
    assert [name in labels for name in ("int8", "mxfp4", "nf4-dq", "int2", "fp16")] == [True] * 3 + [
        False
    ] * 2
    points = [tuple(point) for line in panel.lines[:3] for point in line.get_xydata().tolist()]
    assert points == [(8.5, 1e-5), (4.25, 0.02), (4.13, 0.03)]
    save_figure(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_of_the_reference_alone_is_no_failure(tmp_path):
    save_figure(compared(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").is_file()


def test_a_figure_that_could_not_be_drawn_is_refused_beforehand(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"ends in \.png"):
        check_figure(tmp_path / "figure.jpg")
    with pytest.raises(ConfigError, match="no such folder"):
        check_figure(tmp_path / "absent" / "figure.png")
    check_figure(Path("figure.png"))
    monkeypatch.setattr(comparison_figure, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="mlx-qlora\\[plots\\]"):
        check_figure(tmp_path / "figure.png")
