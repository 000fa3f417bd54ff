"""The role of services needs no more rights than docs/operations.md gives it: it reads and changes rows, and makes no
tables."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from memory_service.domain.errors import StartError
from memory_service.domain.limits import Limits
from tests.support import postgres
from tests.support.engines import ENGINES, opened
from tests.support.store import fill, held, new_bank

KIND = ENGINES["postgres"]
pytestmark = pytest.mark.skipif(bool(KIND.missing()), reason=KIND.missing())
PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
ROLE = "kvbank"


@pytest.fixture
def rights() -> str:
    """Return the statements of the page, for a role of the tests."""
    (block,) = re.findall(r"```sql\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return block


@pytest.fixture
def place(tmp_path: Path, rights: str) -> Iterator[Mapping[str, Any]]:
    """Make a place with the role of services, whose rights are those of the page."""
    with KIND.place(tmp_path) as made, psycopg.connect(made["data"], autocommit=True) as owner:
        name, host = owner.info.dbname, conninfo_to_dict(made["data"])["host"]
        for statement in rights.split(";"):
            if lines := [line for line in statement.splitlines() if line.strip() and not line.startswith("--")]:
                here = (
                    "\n".join(lines).replace("DATABASE kvbank", f"DATABASE {name}").replace("kvbank_owner", "postgres")
                )
                owner.execute(here)
        yield {**made, "data": f"postgresql://{ROLE}@/{name}?host={host}"}
        owner.execute(f"DROP OWNED BY {ROLE}")
        owner.execute(f"DROP ROLE {ROLE}")


def test_a_service_works_as_a_role_that_makes_no_tables(place: Mapping[str, Any]) -> None:
    with opened(place, limits=Limits(expiry_s=0.05)) as engine:
        bank, _ = engine.store.create_bank(new_bank())
        ids = fill(engine.store, bank, range(3))
        engine.store.remove(bank, ids[:1]).result(60)
        assert held(engine.store, bank) == ids[1:]
        engine.store.delete_bank(bank.tenant, bank.name)


def test_it_makes_no_tables_of_its_own(place: Mapping[str, Any]) -> None:
    with (
        psycopg.connect(place["data"], autocommit=True) as service,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        service.execute("CREATE TABLE own (id int)")


def test_an_empty_database_is_for_its_owner(tmp_path: Path, place: Mapping[str, Any]) -> None:
    with postgres.database(empty=True) as url:
        name, host = conninfo_to_dict(url)["dbname"], conninfo_to_dict(url)["host"]
        with (
            pytest.raises(StartError, match=r"kvbank migrate|permission denied"),
            opened({**place, "data": f"postgresql://{ROLE}@/{name}?host={host}"}),
        ):
            pass
