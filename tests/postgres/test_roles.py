"""Services that connect as a role which may change rows alone, made as docs/operations.md says."""

import re
from pathlib import Path

import psycopg
import pytest

from memory_service.domain.model import Capacity, Policy
from memory_service.domain.tenants import DEFAULT_TENANT
from tests.support import postgres
from tests.support.engines import ENGINES, opened
from tests.support.store import fill, held, new_bank
from tests.support.waiting import wait_until

KIND = ENGINES["postgres"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(KIND.missing()), reason=KIND.missing())]
PAGE = Path(__file__).parents[2] / "docs/operations.md"


def test_such_a_role_can_do_what_a_service_does_and_makes_no_tables(tmp_path: Path) -> None:
    found = re.search(r"```sql\n(CREATE ROLE kvbank_service.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    with (
        KIND.place(tmp_path) as place,
        psycopg.connect(postgres.of(place["data"], postgres.OWNER), autocommit=True) as owner,
    ):
        owner.execute(found[1].encode())
        try:
            url = postgres.of(place["data"], "kvbank_service")
            with psycopg.connect(url) as service, pytest.raises(psycopg.errors.InsufficientPrivilege):
                service.execute("CREATE TABLE more (id int)")
            with opened({**place, "data": url}, migrate=True) as engine:
                bank, _ = engine.store.create_bank(new_bank(capacity=Capacity("chunks", 10), policy=Policy("lru")))
                fill(engine.store, bank, range(25))
                ids = held(engine.store, bank)
                assert 5 <= len(ids) <= 10
                assert engine.store.remove(bank, ids[:1]).result(60) == ids[:1]
                engine.store.delete_bank(DEFAULT_TENANT, bank.name)
                wait_until(lambda: owner.execute("SELECT count(*) FROM gone_banks").fetchall() == [(0,)])
                engine.probe()
                assert engine.sizes().taken > 0
        finally:
            owner.execute("DROP OWNED BY kvbank_service")
            owner.execute("DROP ROLE kvbank_service")
