"""Requests made from the server's own description, valid and not: none is a crash, a 500, or undescribed."""

import pytest

schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.served import chat  # noqa: E402

QUICK, THOROUGH = 60, 5000
NUM_OPERATIONS = 6
CHECKS = (
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
)


def fuzz(served, num_requests):
    """Send requests to every operation, most to the two that generate; how many were sent, by status."""
    description = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    operations = [found.ok() for found in description.get_all_operations()]
    assert len(operations) == NUM_OPERATIONS
    statuses: dict[int, int] = {}
    for operation in operations:
        share = 0.52 if operation.method == "post" else 0.01
        send_many(operation, served, max(2, round(num_requests * share)), statuses)
    return statuses


def send_many(operation, served, num_requests, statuses):
    """Half of the requests follow the schema, half break it."""
    for mode in schemathesis.GenerationMode:
        if mode.is_negative and operation.method != "post":
            continue
        strategy = operation.as_strategy(generation_mode=mode)

        @given(case=strategy)
        @settings(
            max_examples=num_requests // 2,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def send(case):
            if isinstance(case.body, dict):
                case.body = shortened(case.body)
            response = case.call(base_url=served.url, timeout=120)
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
            case.validate_response(response, checks=CHECKS)

        send()


def shortened(body):
    """The request with an answer of a few tokens, where it would be a long one."""
    names = ("max_tokens", "max_completion_tokens")
    short = {name: 3 for name in names if isinstance(body.get(name), int) and 3 < body[name] <= 512}
    is_open = body.get("max_tokens") is None and body.get("max_completion_tokens") is None
    return {**body, **({"max_tokens": 3} if is_open else short)}


def answered(served):
    with served.client() as client:
        answer = client.post("/v1/chat/completions", json=chat("one"))
    return answer.status_code == 200 and served.process.poll() is None


def test_requests_from_the_description_are_answered_as_it_says(served):
    statuses = fuzz(served, QUICK)
    assert {200, 422} <= statuses.keys()
    assert answered(served)


@pytest.mark.slow
@pytest.mark.long
def test_thousands_of_requests_from_the_description_are_answered_as_it_says(served):
    statuses = fuzz(served, THOROUGH)
    print(f"{sum(statuses.values())} requests: {dict(sorted(statuses.items()))}")
    assert sum(statuses.values()) >= THOROUGH
    assert answered(served)
