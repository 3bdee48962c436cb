import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_qlora.config import QuantizationConfig
from mlx_qlora.inference.generate import Sampling, generate_pieces, load_assistant
from mlx_qlora.quantization.dense import MIN_ROWS


@pytest.fixture(scope="module")
def assistant(tiny_llama_folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_QLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        return load_assistant(str(tiny_llama_folder), quantization=QuantizationConfig(scheme="int4"))


def kinds(model: nn.Module) -> set[type]:
    return {type(m) for _, m in model.named_modules() if isinstance(m, nn.QuantizedLinear)}


def long_prompt(assistant) -> list[int]:
    prompt = list(assistant.tokenizer.encode("Em que ano foi fundado o clube? " * 20))
    assert len(prompt) > 4 * MIN_ROWS
    return prompt


def test_a_long_prompt_is_answered_as_mlx_lm_answers_it(assistant):
    from mlx_lm.generate import generate

    prompt = long_prompt(assistant)
    pieces = list(generate_pieces(assistant.model, assistant.tokenizer, prompt, Sampling(max_tokens=12)))
    answer = pieces[-1][1]
    assert answer.text == generate(assistant.model, assistant.tokenizer, prompt, max_tokens=12)
    assert answer.text == "".join(piece for piece, _ in pieces)
    assert answer.prompt_tokens == len(prompt)
    assert 0 < answer.generation_tokens <= 12


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="weights are unpacked on a CPU only")
def test_the_prompt_goes_through_unpacked_weights_on_a_cpu(assistant):
    pieces = generate_pieces(assistant.model, assistant.tokenizer, long_prompt(assistant), Sampling())
    next(pieces)
    assert nn.QuantizedLinear not in kinds(assistant.model)
    pieces.close()


def test_a_model_is_as_before_when_an_answer_is_left_halfway(assistant):
    pieces = generate_pieces(assistant.model, assistant.tokenizer, long_prompt(assistant), Sampling())
    next(pieces)
    pieces.close()
    assert kinds(assistant.model) == {nn.QuantizedLinear}


def test_two_answers_at_once_leave_the_model_as_it_was(assistant):
    prompt = long_prompt(assistant)
    first, second = (
        generate_pieces(assistant.model, assistant.tokenizer, prompt, Sampling(max_tokens=6)) for _ in "ab"
    )
    texts = {"first": "", "second": ""}
    for (one, _), (other, _) in zip(first, second, strict=True):
        texts["first"] += one
        texts["second"] += other
    assert texts["first"] == texts["second"]
    assert kinds(assistant.model) == {nn.QuantizedLinear}
