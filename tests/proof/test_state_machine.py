"""Random operations against an oracle in memory, with restarts, kills, expiry, evictions and two clients."""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.proof.replay import replay
from tests.proof.sites import SITES, OnFolder
from tests.proof.world import World
from tests.support.engines import ENGINES
from tests.support.service_process import ROOT, ServiceHost

EXAMPLES = int(os.environ.get("KVBANK_PROOF_EXAMPLES", "3"))
# Where the failures of long runs are kept, which may be rare, and may not come again.
KEPT = ROOT / "build/proof"
STEPS = 30
# The steps that start a service again, and how many others come in between: else most steps would be of these.
STARTS, BETWEEN_STARTS = {"restart", "kill", "kill_in_write"}, 4
# What the quick form draws by: steps of 15 kinds.
QUICK_SEED = 4
DATABASE = ENGINES["postgres"]
BANKS = st.sampled_from(["a", "b"])
NUMBERS = st.integers(0, 60)
CLIENTS = st.integers(0, 1)
HALVES = st.sampled_from(["", "0", "1"])
CAPACITIES = st.sampled_from([None, 3, 8])
POLICIES = st.sampled_from(["frequency", "lru", "recency_half", "reject"])
TTLS = st.sampled_from([0, 0, 0, 0.05, 3600])


def machine(host: ServiceHost, kept: Path, site: str = "folder") -> type[RuleBasedStateMachine]:
    """Return a machine over a site of this kind, whose failing run leaves its steps, and what explains them, in
    `kept`."""

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self._site = ExitStack()
            folder = self._site.enter_context(tempfile.TemporaryDirectory(prefix="kvbank-proof-"))
            self._world = World(self._site.enter_context(SITES[site](host, Path(folder))))
            self._failed = False
            self._since_start = 0

        def do(self, op: str, **arguments: object) -> None:
            self._since_start = 0 if op in STARTS else self._since_start + 1
            try:
                self._world.do(op, **arguments)
            except Exception as error:
                self._failed = True
                error.add_note(f"replay it: python -m tests.proof.replay {self._world.keep(kept, error)} {site}")
                raise

        def has(self, bank: str) -> bool:
            return bank in self._world.banks

        @initialize(capacity=CAPACITIES, policy=POLICIES)
        def begin(self, capacity, policy):
            self.create("a", capacity, policy, 0)

        @rule(bank=BANKS, capacity=CAPACITIES, policy=POLICIES, ttl=TTLS)
        def create(self, bank, capacity, policy, ttl):
            if not self.has(bank):
                self.do("create", bank=bank, capacity=capacity, policy=policy, ttl=ttl)

        @precondition(lambda self: self._world.banks)
        @rule(bank=BANKS)
        def delete_bank(self, bank):
            if self.has(bank) and len(self._world.banks[bank].gone) > 3:
                self.do("delete_bank", bank=bank)

        @precondition(lambda self: self._world.banks)
        @rule(bank=BANKS, capacity=st.integers(2, 10))
        def set_capacity(self, bank, capacity):
            if self.has(bank):
                self.do("set_capacity", bank=bank, capacity=capacity)

        @precondition(lambda self: self._world.banks)
        @rule(bank=BANKS, quota=st.sampled_from([0, 0, 4, 12]))
        def set_quota(self, bank, quota):
            if self.has(bank):
                self.do("set_quota", bank=bank, quota=quota)

        @precondition(lambda self: self._world.banks)
        @rule(
            bank=BANKS,
            numbers=st.lists(NUMBERS, min_size=1, max_size=5, unique=True),
            pinned=st.sampled_from([False, False, False, True]),
            ttl=TTLS,
            client=CLIENTS,
        )
        def write(self, bank, numbers, pinned, ttl, client):
            new = self._world.unused(bank, numbers) if self.has(bank) else []
            if new:
                self.do("write", bank=bank, numbers=new, pinned=pinned, ttl=ttl, client=client)

        @precondition(lambda self: self._world.banks)
        @rule(bank=BANKS, which=NUMBERS)
        def rewrite(self, bank, which):
            if self.has(bank):
                self.do("rewrite", bank=bank, which=which)

        @precondition(lambda self: self._world.banks)
        @rule(bank=BANKS, first=st.lists(NUMBERS, min_size=1, max_size=4, unique=True))
        def write_together(self, bank, first):
            new = self._world.unused(bank, first) if self.has(bank) else []
            if new:
                self.do("write_together", bank=bank, first=new, second=[number + 100 for number in new])

        @precondition(lambda self: self._world.banks)
        @rule(bank=BANKS, query=NUMBERS, top_k=st.integers(1, 6), count=st.booleans(), half=HALVES, client=CLIENTS)
        def retrieve(self, bank, query, top_k, count, half, client):
            if self.has(bank):
                asked = {"query": query, "top_k": top_k, "count": count, "half": half, "client": client}
                self.do("retrieve", bank=bank, **asked)

        @precondition(lambda self: self._world.banks)
        @rule(bank=BANKS, which=NUMBERS, client=CLIENTS)
        def fetch(self, bank, which, client):
            if self.has(bank):
                self.do("fetch", bank=bank, which=which, client=client)

        @precondition(lambda self: self._world.banks)
        @rule(bank=BANKS, which=NUMBERS, half=HALVES)
        def update(self, bank, which, half):
            if self.has(bank):
                self.do("update", bank=bank, which=which, half=half)

        @precondition(lambda self: self._world.banks)
        @rule(bank=BANKS, which=NUMBERS, pinned=st.booleans())
        def pin(self, bank, which, pinned):
            if self.has(bank):
                self.do("pin", bank=bank, which=which, pinned=pinned)

        @precondition(lambda self: self._world.banks)
        @rule(bank=BANKS, which=st.lists(NUMBERS, min_size=1, max_size=3))
        def delete(self, bank, which):
            if self.has(bank):
                self.do("delete", bank=bank, which=which)

        @precondition(lambda self: self._since_start >= BETWEEN_STARTS)
        @rule()
        def restart(self):
            self.do("restart")

        @precondition(lambda self: self._since_start >= BETWEEN_STARTS)
        @rule()
        def kill(self):
            self.do("kill")

        @precondition(lambda self: self._world.banks and self._since_start >= BETWEEN_STARTS)
        @rule(bank=BANKS, numbers=st.lists(NUMBERS, min_size=2, max_size=5, unique=True), after=st.integers(0, 3))
        def kill_in_write(self, bank, numbers, after):
            new = self._world.unused(bank, numbers) if self.has(bank) else []
            if new:
                self.do("kill_in_write", bank=bank, numbers=new, after=after)

        def teardown(self):
            try:
                if not self._failed:
                    self.do("check")
            finally:
                self._world.close()
                self._site.close()

    return Machine


def test_the_store_does_what_the_oracle_says(host, tmp_path):
    run(host, tmp_path, "folder", EXAMPLES)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(bool(DATABASE.missing()), reason=DATABASE.missing())
def test_two_services_on_one_database_do_what_the_oracle_says(host, tmp_path):
    """Give each of the two clients a service, of which one is killed, and both are restarted, now and then."""
    run(host, tmp_path, "database", max(EXAMPLES // 3, 2))


@pytest.mark.skipif(bool(DATABASE.missing()), reason=DATABASE.missing())
def test_two_services_on_one_database_do_what_the_oracle_says_in_some_steps(host, tmp_path):
    """Take steps of each kind: random ones, of which it takes many, would be as many starts."""
    asked = {"bank": "a", "top_k": 4, "count": True, "half": ""}
    steps = [
        *(_create("a", 8), _write("a", [1, 2, 3]), _write("a", [4, 5], client=1), _write("a", [6], pinned=True)),
        *(_step("retrieve", query=1, client=number % 2, **asked) for number in range(3)),
        *(_step("update", bank="a", which=1, half="0"), _step("pin", bank="a", which=0, pinned=True)),
        _step("retrieve", query=4, client=1, **asked | {"half": "0"}),
        *(_step("write_together", bank="a", first=[7, 8], second=[9, 10]), _step("fetch", bank="a", which=3, client=1)),
        *(
            _step("delete", bank="a", which=[2, 4]),
            _write("a", [11], client=1),
            _step("set_capacity", bank="a", capacity=4),
        ),
        *(_step("kill"), _write("a", [12]), _step("rewrite", bank="a", which=1), _step("check")),
        *(_step("kill_in_write", bank="a", numbers=[13, 14], after=1), _write("a", [15], ttl=0.05), _step("check")),
        *(_create("b", None), _write("b", [1, 2], client=1), _step("delete_bank", bank="b"), _step("check")),
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, steps)))
    assert replay(host, trace, "database") == len(steps)


def run(host: ServiceHost, folder: Path, site: str, examples: int) -> None:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    # A trace of thirty steps can be read; to shorten it would start the service a thousand times.
    phases = [Phase.generate]
    # The quick form takes the same steps each time; to look for new ones, ask for a number of examples.
    quick = "KVBANK_PROOF_EXAMPLES" not in os.environ
    limits = settings(
        max_examples=examples,
        database=None if quick else settings.default.database,
        stateful_step_count=STEPS,
        deadline=None,
        phases=phases,
        suppress_health_check=slow,
    )
    made = machine(host, folder if quick else KEPT, site)
    run_state_machine_as_test(seed(QUICK_SEED)(made) if quick else made, settings=limits)


def test_the_oracle_allows_what_the_contract_allows(host, tmp_path):
    """Steps at whose end the store may be in several states, depending on which thread comes first."""
    steps = [
        # An expired chunk is evicted before it is removed; then one whose write had no answer.
        *(_create("a", 3), _write("a", [1], ttl=0.05), _write("a", [2, 3]), *4 * [_step("check")], _write("a", [4])),
        *(_create("b", 3, ttl=0.05), _step("kill_in_write", bank="b", numbers=[1, 2, 3], after=1), _write("b", [4])),
        # Pinned chunks that nobody has seen take their room until they are removed.
        *(_create("c", 2), _write("c", [1, 2, 3], ttl=0.0005, pinned=True), _write("c", [4])),
        # A bank is brought down in the background.
        *(*_fill("d"), _step("set_capacity", bank="d", capacity=2), _step("rewrite", bank="d", which=0)),
        *(*_fill("e"), _step("set_capacity", bank="e", capacity=2), _step("check")),
        *(*_fill("f"), _step("set_capacity", bank="f", capacity=2), _step("kill")),
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, steps)))
    assert replay(host, trace) == len(steps)


def _step(op, **arguments):
    return {"op": op} | arguments


def _create(bank, capacity, ttl=0):
    return _step("create", bank=bank, capacity=capacity, policy="lru", ttl=ttl)


def _write(bank, numbers, ttl=0, pinned=False, client=0):
    return _step("write", bank=bank, numbers=numbers, pinned=pinned, ttl=ttl, client=client)


def _fill(bank):
    return _create(bank, None), _write(bank, [1, 2, 3, 4]), _write(bank, [5, 6, 7, 8])


@pytest.mark.slow
def test_a_failing_trace_is_saved_and_fails_again(host, tmp_path):
    """Damage of a file stands for a defect."""
    (tmp_path / "world").mkdir()
    world = World(OnFolder(host, tmp_path / "world"))
    world.do("create", bank="a", capacity=None, policy="frequency", ttl=0)
    world.do("write", bank="a", numbers=[1, 2], pinned=False, ttl=0, client=0)
    world.do("fetch", bank="a", which=1, client=1)
    world.save(tmp_path / "good.jsonl")
    assert replay(host, tmp_path / "good.jsonl") == 3
    world.do("damage", bank="a", which=0)
    with pytest.raises(Exception, match="damaged") as failure:
        world.do("check")
    trace = world.keep(tmp_path / "kept", failure.value)
    world.close()
    assert "damaged" in (trace.parent / "error.txt").read_text()
    command = [sys.executable, "-m", "tests.proof.replay", str(trace)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "step 5 of 5 fails" in done.stdout
