from prometheus_client.parser import text_string_to_metric_families

from mlx_qlora.serving.jobs import EngineStats
from mlx_qlora.serving.metrics import Metrics

STATS = EngineStats(
    num_queued=1, num_running=2, num_finished=3, num_cancelled=4, num_failed=5, num_prompt_tokens=60,
    num_cached_tokens=7, num_generated_tokens=80, is_alive=True,
)  # fmt: skip


def samples(metrics):
    families = text_string_to_metric_families(metrics.text().decode())
    return {
        (each.name, tuple(each.labels.values())): each.value for family in families for each in family.samples
    }


def test_the_engines_counts_are_read_when_they_are_asked_for():
    now = [STATS]
    metrics = Metrics(lambda: now[0])
    found = samples(metrics)
    assert found["mlx_qlora_requests_queued", ()] == 1
    assert found["mlx_qlora_requests_running", ()] == 2
    assert found["mlx_qlora_answers_finished_total", ()] == 3
    assert found["mlx_qlora_answers_cancelled_total", ()] == 4
    assert found["mlx_qlora_answers_failed_total", ()] == 5
    assert found["mlx_qlora_prompt_tokens_total", ()] == 60
    assert found["mlx_qlora_cached_prompt_tokens_total", ()] == 7
    assert found["mlx_qlora_generated_tokens_total", ()] == 80
    assert found["mlx_qlora_generation_alive", ()] == 1
    now[0] = EngineStats(**{**vars(STATS), "is_alive": False})
    assert samples(metrics)["mlx_qlora_generation_alive", ()] == 0


def test_responses_are_counted_by_path_and_status_and_times_observed_by_name():
    metrics = Metrics(lambda: STATS)
    for status in (200, 200, 422):
        metrics.count_response("/v1/completions", status)
    metrics.observe("first_token_seconds", 0.3)
    metrics.observe("of another name", 1.0)
    found = samples(metrics)
    assert found["mlx_qlora_http_responses_total", ("/v1/completions", "200")] == 2
    assert found["mlx_qlora_http_responses_total", ("/v1/completions", "422")] == 1
    assert found["mlx_qlora_first_token_seconds_count", ()] == 1
    assert found["mlx_qlora_first_token_seconds_sum", ()] == 0.3


def test_two_servers_in_one_process_count_apart():
    one, other = Metrics(lambda: STATS), Metrics(lambda: STATS)
    one.count_response("/", 200)
    assert ("mlx_qlora_http_responses_total", ("/", "200")) not in samples(other)
