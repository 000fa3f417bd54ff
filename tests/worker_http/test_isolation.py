"""Tenants that call their sessions the same see, step by step, what each would see alone."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

import kvbank
from memory_service.api.embedded import LocalServer
from tests.worker_http.conftest import Running
from tests.worker_http.test_chat import ask

NAMES = ("one", "two")
TEXTS = ("the sea is wide", "ships come", "who said that?", "and then there was a long night with no wind at all")


@pytest.fixture(scope="module")
def keyed(
    serving: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., openai.OpenAI]]:
    """Return what makes a client of a tenant of its own, which calls a worker before a service that asks for keys."""
    with LocalServer(tmp_path_factory.mktemp("keyed"), listen="127.0.0.1:0", durability="os") as service:
        with kvbank.connect(service.address) as owner:
            operator = owner.access.create_key("operator").secret
        with (
            kvbank.connect(service.address, api_key=operator) as client,
            serving(target=service.address) as running,
        ):
            worker: Running = running.loaded()

            def made(tenant: str) -> openai.OpenAI:
                client.access.create_tenant(tenant)
                return worker.client(client.access.create_key("write", tenant=tenant).secret)

            yield made


class Line:
    """What a client has said and heard in a session of a name; it may go back, and say something else."""

    def __init__(self) -> None:
        self.messages: list[dict[str, str]] = []

    def step(self, client: openai.OpenAI, name: str, text: str, back: int) -> tuple[str, int, int]:
        """Say a text, `back` turns before the end; return the answer, and the tokens that were there and were new."""
        kept = max(0, len(self.messages) - 2 * back)
        self.messages = [*self.messages[:kept], {"role": "user", "content": text}]
        options = {"max_completion_tokens": 4, "extra_headers": {"X-Kvbank-Session": name}}
        found = ask(client, self.messages, **options)
        answer = found.choices[0].message.content
        self.messages.append({"role": "assistant", "content": answer})
        return answer, found.usage.prompt_tokens, found.usage.prompt_tokens_details.cached_tokens


def steps(choose: random.Random, count: int) -> list[tuple[str, str, int]]:
    """Draw some random steps: the name of a session, a text, and how many turns to go back before."""
    back = (0, 0, 0, 1, 2)
    return [(choose.choice(NAMES), choose.choice(TEXTS), choose.choice(back)) for _ in range(count)]


def talk(client: openai.OpenAI, lines: dict[str, Line], step: tuple[str, str, int]) -> tuple[str, int, int]:
    name, text, back = step
    return lines.setdefault(name, Line()).step(client, name, text, back)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_each_tenant_sees_what_it_would_see_alone(keyed: Callable[..., openai.OpenAI], seed: int) -> None:
    choose = random.Random(seed)
    plans = {tenant: steps(choose, 40) for tenant in ("red", "blue")}
    alone, together = dict[str, list[Any]](), {tenant: list[Any]() for tenant in plans}
    for tenant, plan in plans.items():
        lines = dict[str, Line]()
        with keyed(f"{tenant}-{seed}-alone") as client:
            alone[tenant] = [talk(client, lines, step) for step in plan]
    clients = {tenant: keyed(f"{tenant}-{seed}") for tenant in plans}
    held = {tenant: dict[str, Line]() for tenant in plans}
    waiting = {tenant: list(plan) for tenant, plan in plans.items()}
    while left := [tenant for tenant in plans if waiting[tenant]]:
        tenant = choose.choice(left)
        together[tenant].append(talk(clients[tenant], held[tenant], waiting[tenant].pop(0)))
    assert together == alone
    for client in clients.values():
        client.close()
