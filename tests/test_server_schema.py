"""Requests that schemathesis makes of the server's own description: whatever comes, no answer is a failure of ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from helpers.fake_engine import FakeEngine
from helpers.servers import Running, running
from hypothesis import HealthCheck, given, settings

from ktcompile.models.load import locate
from ktcompile.models.tokenizer import load_tokenizer

OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/status"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(FakeEngine(tokenizer=load_tokenizer(locate(None)), max_model_len=64)) as result:
        yield result


@pytest.fixture(scope="module")
def description(server: Running) -> Any:
    schema = server.app.openapi()
    assert {(method.upper(), path) for path, of in schema["paths"].items() for method in of} == set(OPERATIONS)
    for record in schema["components"]["schemas"].values():
        if "model" in record.get("properties", {}):  # most requests get past it
            record["properties"]["model"] = {"type": "string", "enum": ["fake"]}
        if "timeout" in record.get("properties", {}):  # 504 is right where there is no time
            record["properties"]["timeout"] = {"type": "number", "minimum": 100}
    return schemathesis.openapi.from_dict(schema)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_request_makes_the_server_fail(server: Running, description: Any, method: str, path: str) -> None:
    seen: Counter[int] = Counter()

    @settings(max_examples=80 if method == "POST" else 10, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=description[path][method].as_strategy())
    def ask(case: Any) -> None:
        response = case.call(base_url=server.url)
        seen[response.status_code] += 1
        assert response.status_code < 500, (response.text, case.body)
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    ask()
    if path not in ("/v1/models/{name}", "/v1/responses", "/v1/chat/completions", "/v1/completions"):
        assert seen[200], seen
