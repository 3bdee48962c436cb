"""What is kept of recent prompts, and what a new one gets of it."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import KVCache, RotatingKVCache

from mlx_qlora.serving.prompt_cache import MIN_SHARED_TOKENS, PromptCache


def caches_of(tokens: list[int], *, window: int | None = None) -> list:
    """Two layers' caches whose keys are the tokens themselves; 16 bytes a token and layer."""
    made = []
    for _ in range(2):
        cache = KVCache() if window is None else RotatingKVCache(window)
        cache.keys = cache.values = mx.array(tokens, mx.float32)[None, None, :, None] * mx.ones((1, 1, 1, 2))
        cache.offset = len(tokens)
        if window is not None:
            cache._idx = len(tokens)
            if len(tokens) > window:
                cache.keys = cache.values = cache.keys[..., -window:, :]
                cache._idx = window
        made.append(cache)
    return made


def held(caches: list) -> list[int]:
    keys, _ = caches[0].keys_and_values()
    return [int(token) for token in np.array(keys)[0, 0, :, 0]]


TEXT = list(range(100, 140))


def test_the_longest_known_beginning_is_found_and_trimmed():
    cache = PromptCache(10**6)
    cache.keep(1, TEXT, caches_of(TEXT))
    cache.keep(1, TEXT[:20] + [7] * 9, caches_of(TEXT[:20] + [7] * 9))
    known, caches = cache.find(1, [*TEXT[:30], 1, 2])
    assert known == TEXT[:30] == held(caches)
    known, caches = cache.find(1, [*TEXT[:20], 7, 7, 8])
    assert known == [*TEXT[:20], 7, 7] == held(caches)


def test_the_last_token_of_a_prompt_is_always_left():
    cache = PromptCache(10**6)
    cache.keep(1, TEXT, caches_of(TEXT))
    known, caches = cache.find(1, TEXT)
    assert known == TEXT[:-1] == held(caches)


def test_adapters_do_not_share():
    cache = PromptCache(10**6)
    cache.keep(1, TEXT, caches_of(TEXT))
    assert cache.find(2, TEXT) is None
    assert cache.find(0, TEXT) is None


def test_a_short_beginning_is_not_worth_it():
    cache = PromptCache(10**6)
    cache.keep(1, TEXT, caches_of(TEXT))
    assert cache.find(1, [*TEXT[: MIN_SHARED_TOKENS - 1], 5, 5, 5]) is None
    assert cache.find(1, [*TEXT[:MIN_SHARED_TOKENS], 5, 5, 5]) is not None


def test_what_is_found_can_be_used_without_changing_what_is_kept():
    cache = PromptCache(10**6)
    cache.keep(1, TEXT, caches_of(TEXT))
    _, caches = cache.find(1, [*TEXT[:12], 3])
    for layer in caches:
        layer.update_and_fetch(mx.full((1, 1, 5, 2), -1.0), mx.full((1, 1, 5, 2), -1.0))
    assert held(cache.find(1, [*TEXT, 0])[1]) == TEXT


def test_a_window_that_has_gone_round_serves_only_as_a_whole():
    cache = PromptCache(10**6)
    cache.keep(1, TEXT, caches_of(TEXT, window=16))
    assert cache.find(1, [*TEXT[:30], 1, 2]) is None
    known, _ = cache.find(1, [*TEXT, 1, 2])
    assert known == TEXT
    assert cache.find(1, TEXT) is None


def test_a_window_that_has_not_gone_round_can_be_trimmed():
    cache = PromptCache(10**6)
    cache.keep(1, TEXT, caches_of(TEXT, window=64))
    known, caches = cache.find(1, [*TEXT[:30], 1, 2])
    assert known == TEXT[:30] == held(caches)


def test_a_text_that_goes_on_replaces_its_beginning():
    cache = PromptCache(10**6)
    cache.keep(1, TEXT[:20], caches_of(TEXT[:20]))
    cache.keep(1, TEXT, caches_of(TEXT))
    assert len(cache) == 1
    assert cache.num_bytes == 2 * 16 * len(TEXT)


def test_a_beginning_stays_where_what_goes_on_cannot_be_trimmed():
    cache = PromptCache(10**6)
    cache.keep(1, TEXT[:20], caches_of(TEXT[:20], window=16))
    cache.keep(1, TEXT, caches_of(TEXT, window=16))
    assert len(cache) == 2
    assert cache.find(1, [*TEXT[:20], 5])[0] == TEXT[:20]


def test_the_oldest_goes_first_and_use_makes_young():
    texts = [[number] * 20 for number in range(3)]
    cache = PromptCache(3 * 20 * 32)
    for text in texts:
        cache.keep(0, text, caches_of(text))
    cache.find(0, [*texts[0], 9])
    cache.keep(0, [9] * 20, caches_of([9] * 20))
    assert [cache.find(0, [*text, 5]) is not None for text in [*texts, [9] * 20]] == [True, False, True, True]


def test_a_text_larger_than_all_is_not_kept():
    cache = PromptCache(100)
    cache.keep(0, TEXT, caches_of(TEXT))
    assert (len(cache), cache.num_bytes) == (0, 0)


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(
        st.tuples(st.integers(0, 1), st.lists(st.integers(0, 1), min_size=8, max_size=14)), max_size=12
    ),
    max_bytes=st.integers(0, 3000),
    wanted=st.lists(st.integers(0, 1), min_size=1, max_size=16),
)
def test_bytes_stay_within_bounds_and_whatever_is_found_is_right(texts, max_bytes, wanted):
    cache = PromptCache(max_bytes)
    for adapter, text in texts:
        cache.keep(adapter, text, caches_of(text))
        assert (
            cache.num_bytes == sum(32 * len(entry.tokens) for entry in cache._entries.values()) <= max_bytes
        )
    found = cache.find(0, wanted)
    if found is not None:
        known, caches = found
        assert known == wanted[: len(known)] == held(caches)
        assert MIN_SHARED_TOKENS <= len(known) < len(wanted)


@pytest.mark.parametrize("bound", [0, 10**6])
def test_clearing_gives_all_bytes_back(bound):
    cache = PromptCache(bound)
    cache.keep(0, TEXT, caches_of(TEXT))
    cache.clear()
    assert (len(cache), cache.num_bytes) == (0, 0)
    assert cache.find(0, [*TEXT, 1]) is None
