"""The app against its own OpenAPI document: bodies that fit the document, and bodies that do not."""

from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi import checks

from tests.worker_http.conftest import MODEL, Running

EXAMPLES = 50
pytestmark = pytest.mark.slow
CHECKS = [
    *(not_a_server_error, checks.status_code_conformance, checks.content_type_conformance),
    *(checks.response_schema_conformance, checks.negative_data_rejection, checks.unsupported_method),
]


def answered_as_it_says(operation: APIOperation, mode: schemathesis.GenerationMode) -> None:
    """Ask with bodies and parameters of a mode, and check every answer."""

    @given(case=operation.as_strategy(mode))
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    def ask(case: Any) -> None:
        if mode == schemathesis.GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body["model"] = MODEL  # else hardly one is answered
        answer = case.call_and_validate(checks=CHECKS)
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    ask()


def test_every_path_answers_as_the_document_says(serving: Callable[..., Any]) -> None:
    with serving(bounds={"new_tokens": 4}) as running:
        schema = schemathesis.openapi.from_url(f"{running.loaded().url}/openapi.json")
        for operation in (found.ok() for found in schema.get_all_operations()):
            answered_as_it_says(operation, schemathesis.GenerationMode.POSITIVE)
            if operation.body:  # what has no body has nothing that can be wrong
                answered_as_it_says(operation, schemathesis.GenerationMode.NEGATIVE)


def test_the_document_names_what_is_answered(worker: Running) -> None:
    schema = schemathesis.openapi.from_url(f"{worker.url}/openapi.json")
    paths = {found.ok().path for found in schema.get_all_operations()}
    assert paths == {
        *("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{model}"),
        *("/v1/responses", "/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel"),
        *("/v1/responses/{response_id}/input_items", "/v1/conversations", "/v1/conversations/{conversation}"),
        *("/v1/conversations/{conversation}/items", "/v1/conversations/{conversation}/items/{item_id}"),
        *("/healthz", "/readyz", "/metrics"),
        *("/v1/kvbank/sessions", "/v1/kvbank/responses/{response_id}/trace", "/v1/kvbank/documents/forget"),
        *(f"/v1/kvbank/sessions/{{session_id}}{part}" for part in ("", "/memory", "/timeline")),
        *(f"/v1/kvbank/sessions/{{session_id}}/{verb}" for verb in ("fork", "rewind", "forget")),
    }
