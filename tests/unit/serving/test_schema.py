import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_qlora.serving.admission import job_of
from mlx_qlora.serving.limits import Limits, Refusal
from mlx_qlora.serving.schema import ChatRequest, CompletionRequest, Generation, parsed

TURN = {"role": "user", "content": "oi"}
CHAT = {"model": "base", "messages": [TURN]}


class Sizes:
    vocabulary_size = 100
    context_length = 64


def chat(**more):
    return parsed(ChatRequest, {**CHAT, **more})


def refusal(kind=ChatRequest, **more):
    with pytest.raises(Refusal) as caught:
        parsed(kind, {**CHAT, **more} if kind is ChatRequest else {"model": "base", **more})
    assert caught.value.status == 422
    return caught.value


def job(wanted, tokens=(1, 2), limits=None):
    return job_of(wanted, None, list(tokens), engine=Sizes, limits=limits or Limits())


def test_every_problem_is_said_at_once_each_with_its_field():
    message = refusal(temperature=9, top_p=2, seed="x").message
    for field in ("temperature: ", "top_p: ", "seed: "):
        assert field in message


def test_an_unknown_field_is_refused_with_the_one_it_looks_like():
    found = refusal(max_token=3)
    assert found.param == "max_token"
    assert "'max_tokens'" in found.message
    assert "is it" not in refusal(qqqq=1).message


@pytest.mark.parametrize(
    "field", ["user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"]
)
def test_a_field_about_the_caller_is_taken_and_ignored(field):
    assert job(chat(**{field: {"anything": [1]}})) == job(chat())


@pytest.mark.parametrize("field", sorted(Generation.NOT_SERVED))
def test_a_known_field_that_is_not_served_is_refused_by_name_unless_it_asks_for_nothing(field):
    for nothing in Generation.NOT_SERVED[field][1]:
        assert job(chat(**{field: nothing})) == job(chat())
    found = refusal(**{field: {"type": "something"}})
    assert found.param == field
    assert field in found.message


def test_null_is_the_same_as_absent():
    optional = [name for name, each in ChatRequest.model_fields.items() if not each.is_required()]
    assert job(chat(**dict.fromkeys(optional))) == job(chat())


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("max_tokens", True), ("max_tokens", "8"), ("max_tokens", 8.0), ("temperature", "1"),
        ("temperature", True), ("stream", "yes"), ("stream", 1), ("logit_bias", {"a": 1}),
        ("logit_bias", {"1": "2"}), ("logit_bias", [1]), ("stop", {"a": 1}), ("stop", ["a"] * 17),
        ("stop", ["a" * 257]), ("stop", [""]), ("n", 0), ("n", 2),
        ("seed", 2**63), ("seed", 1.5), ("repetition_penalty", 0), ("repetition_penalty", 1e-100),
        ("stream_options", {"include_usage": True}),
    ],
)  # fmt: skip
def test_types_are_not_guessed_and_ranges_hold(field, wrong):
    assert field in refusal(**{field: wrong}).message


def test_a_tokens_number_by_two_names_has_to_be_the_same():
    assert job(chat(max_tokens=3, max_completion_tokens=3)).max_tokens == 3
    assert job(chat(max_completion_tokens=5)).max_tokens == 5
    assert "differ" in refusal(max_tokens=3, max_completion_tokens=4).message


def test_text_parts_are_joined_and_a_developer_is_the_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    wanted = chat(messages=[{"role": "developer", "content": parts}, TURN])
    assert [message.as_turn() for message in wanted.messages] == [{"role": "system", "content": "ab"}, TURN]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ("", [""])],
)
def test_a_prompt_is_a_text_or_tokens_or_several_of_one_kind(prompt, prompts):
    assert parsed(CompletionRequest, {"model": "base", "prompt": prompt}).prompts == prompts


@pytest.mark.parametrize(
    "prompt", [None, 3, [], [[]], [1, "a"], ["a", 1], [[1], "a"], [1.5], [True], [-1], {}]
)
def test_what_is_no_prompt_is_refused_in_one_line(prompt):
    found = refusal(CompletionRequest, prompt=prompt)
    assert found.param == "prompt"
    assert "\n" not in found.message


def test_log_probabilities_are_asked_for_in_two_ways():
    assert job(chat()).num_top_logprobs is None
    assert job(chat(logprobs=True)).num_top_logprobs == 0
    assert job(chat(logprobs=True, top_logprobs=20)).num_top_logprobs == 20
    assert job(parsed(CompletionRequest, {"model": "b", "prompt": "a", "logprobs": 5})).num_top_logprobs == 5
    assert "top_logprobs" in refusal(top_logprobs=2).message


def test_what_is_asked_for_is_what_the_engine_gets():
    settings = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2,
                "presence_penalty": 0.3, "frequency_penalty": -0.4, "seed": -5,
                "ignore_eos": True}  # fmt: skip
    made = job(chat(**settings, logit_bias={"3": -1.5}, stop=["x", "y"], max_tokens=9))
    assert {name: getattr(made, name) for name in settings} == settings
    assert (made.logit_bias, made.stop, made.max_tokens) == ({3: -1.5}, ("x", "y"), 9)
    assert made.timeout_seconds == Limits().request_seconds


@given(num_prompt=st.integers(1, 80), num_asked=st.none() | st.integers(1, 80), limit=st.integers(1, 80))
def test_prompt_and_answer_fit_the_context_and_the_limit_or_are_refused(num_prompt, num_asked, limit):
    limits = Limits(max_tokens=limit)
    wanted = chat(max_tokens=num_asked)
    fits = num_prompt + (num_asked or 1) <= Sizes.context_length and (num_asked or 1) <= limit
    if fits:
        made = job(wanted, [1] * num_prompt, limits)
        assert 1 <= made.max_tokens <= limit
        assert len(made.tokens) + made.max_tokens <= Sizes.context_length
        assert num_asked in (None, made.max_tokens)
    else:
        with pytest.raises(Refusal) as caught:
            job(wanted, [1] * num_prompt, limits)
        assert caught.value.limit is not None


@pytest.mark.parametrize(
    ("more", "tokens", "param"),
    [
        ({"logit_bias": {"100": 1}}, [1], "logit_bias"),
        ({"top_k": 101}, [1], "top_k"),
        ({}, [100], "prompt"),
        ({}, [], "prompt"),
    ],
)
def test_what_the_vocabulary_does_not_have_is_refused(more, tokens, param):
    with pytest.raises(Refusal) as caught:
        job(chat(**more), tokens)
    assert caught.value.param == param
    assert caught.value.status == 422


def test_the_last_tokens_of_the_vocabulary_are_taken():
    assert job(chat(logit_bias={"99": 1}, top_k=100), [0, 99]).top_k == 100
