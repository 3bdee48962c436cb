"""training/samples.py: answers with and without the adapter, that leave no trace in the model."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_tokenizer

from mlx_qlora.dataset.records import Example
from mlx_qlora.lora.adapter import adapter_tensors
from mlx_qlora.lora.layers import LoRALinear
from mlx_qlora.training import samples
from mlx_qlora.training.samples import CUT, parted, sampled_answers, switched_off
from tests.tiny import tiny_llama, with_lora

VARIANTS = {
    "lora": {},
    "dora": {"variant": "dora"},
    "pissa": {"init": "pissa"},
    "embedding": {"target_modules": ("q_proj", "embed_tokens")},
}


def example(tokens: list[int], answer_at: int, *, end: int | None = None) -> Example:
    mask = np.zeros(len(tokens), bool)
    mask[answer_at:end] = True
    return Example(np.array(tokens, np.int32), mask, f"rows.jsonl:{tokens[0]}")


ROWS = [example([5, 9, 11, 13, 17, 19], 4), example([7, 23, 29, 31], 3)]


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(samples, "MAX_TOKENS", 8)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_folder):
    return load_tokenizer(tiny_llama_folder)


def raw(tensors) -> dict[str, bytes]:
    return {name: np.array(array).tobytes() for name, array in tensors.items()}


def logits(model) -> mx.array:
    return model(mx.array([[5, 9, 11]]))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_switched_off_a_model_computes_what_its_base_does_and_switched_on_again_what_it_did(variant, tied):
    base = tiny_llama(tied=tied)
    base.eval()
    expected = logits(base)
    model = with_lora(tiny_llama(tied=tied), **VARIANTS[variant])
    model.eval()
    adapted, classes = logits(model), [type(m) for _, m in model.named_modules()]
    with switched_off(model):
        assert mx.array_equal(logits(model), expected)
    assert mx.array_equal(logits(model), adapted)
    assert not mx.allclose(adapted, expected)
    assert [type(m) for _, m in model.named_modules()] == classes


def test_an_error_within_leaves_the_adapter_on():
    model = with_lora(tiny_llama())
    with pytest.raises(ZeroDivisionError), switched_off(model):
        _ = 1 / 0
    assert {type(m) for _, m in model.named_modules() if isinstance(m, LoRALinear)} == {LoRALinear}


@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_leave_weights_mode_and_random_state_as_they_were(variant, tokenizer):
    model = with_lora(tiny_llama(), dropout=0.3, **VARIANTS[variant])
    kept = {name: array * 1.5 for name, array in adapter_tensors(model).items()}
    before, random_state = raw(dict(tree_flatten(model.parameters()))), np.array(mx.random.state[0])
    answers = sampled_answers(model, tokenizer, ROWS, adapter=kept)
    assert len(answers) == 2
    assert raw(dict(tree_flatten(model.parameters()))) == before
    assert np.array_equal(np.array(mx.random.state[0]), random_state)
    assert model.training


def test_the_base_answers_as_a_model_that_was_never_adapted_and_the_adapter_as_the_one_that_is_kept(
    tokenizer,
):
    model = with_lora(tiny_llama(tied=True))
    trained = adapter_tensors(model)
    zeros = {name: mx.zeros(array.shape) for name, array in trained.items()}
    for sample in sampled_answers(model, tokenizer, ROWS, adapter=zeros):
        assert sample.adapted == sample.base
    loud = {name: array * 40 for name, array in trained.items()}
    assert any(s.adapted != s.base for s in sampled_answers(model, tokenizer, ROWS, adapter=loud))


def test_a_sample_tells_the_prompt_the_answer_and_where_the_row_stands(tokenizer):
    text = "o clube venceu"
    tokens = tokenizer.encode(text)
    row = example([*tokenizer.encode("quem?"), *tokens], len(tokenizer.encode("quem?")))
    (sample,) = sampled_answers(with_lora(tiny_llama(bits=None)), tokenizer, [row], adapter=_adapter())
    assert sample.prompt == "quem?"
    assert sample.expected == text
    assert sample.base.endswith(CUT)  # a random model does not end by itself


def _adapter():
    return adapter_tensors(with_lora(tiny_llama(bits=None)))


def test_when_time_is_up_no_more_is_asked(tokenizer):
    model = with_lora(tiny_llama())
    assert sampled_answers(model, tokenizer, ROWS, adapter=adapter_tensors(model), max_seconds=0.0) == []


def test_a_request_to_stop_ends_an_answer_within_a_token(tokenizer):
    model, asked = with_lora(tiny_llama()), []

    def should_stop() -> bool:
        asked.append(True)
        return len(asked) > 4

    sampled_answers(model, tokenizer, ROWS, adapter=adapter_tensors(model), should_stop=should_stop)
    assert len(asked) < 10


@pytest.mark.parametrize(
    ("row", "prompt", "expected"),
    [
        (example([1, 2, 3, 4], 2), [1, 2], [3, 4]),
        (example([1, 2, 3, 4, 5, 6], 2, end=4), [1, 2], [3, 4]),
        (example(list(range(1, 31)), 1), list(range(1, 11)), list(range(11, 31))),
        (example([1, 2], 1), [1], [2]),
        (example([1, 2, 3], 3), [], []),
    ],
    ids=["an answer", "the first of several answers", "plain text", "two tokens", "no target"],
)
def test_a_row_is_parted_into_prompt_and_answer(row, prompt, expected):
    assert parted(row) == (prompt, expected)
