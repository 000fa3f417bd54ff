"""What the service counts: the right amounts, in a registry of its own, with few labels, as documented."""

import json
import re
import ssl
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client import generate_latest, parser

import kvbank
from kvbank.v1 import bank_pb2
from kvbank.v1 import service_pb2 as pb
from memory_service.api.embedded import LocalServer
from memory_service.domain.errors import StartError
from memory_service.observe.metrics import BucketFigures, Metrics
from tests.support.certificates import Authority

ROOT = Path(__file__).resolve().parents[2]


class Figures:
    """One scrape of /metrics."""

    def __init__(self, address: str, context: ssl.SSLContext | None = None) -> None:
        scheme = "http" if context is None else "https"
        with urllib.request.urlopen(f"{scheme}://{address}/metrics", context=context) as answer:
            self.families = list(parser.text_string_to_metric_families(answer.read().decode()))

    def __call__(self, name: str, **labels: str) -> float:
        """Add up all samples that have these labels."""
        samples = [sample for family in self.families for sample in family.samples]
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    def labels(self) -> dict[str, set[str]]:
        """Label -> its values."""
        found: defaultdict[str, set[str]] = defaultdict(set)
        for family in self.families:
            for sample in family.samples:
                for label, value in sample.labels.items():
                    found[label].add(value)
        return found


@pytest.fixture
def caller(serving: Callable[..., Any]) -> Any:
    caller = serving(metrics_listen="127.0.0.1:0")
    caller.create()
    return caller


@pytest.fixture
def scrape(serving: Any, caller: Any) -> Callable[[], Figures]:
    """Read the metrics when every request has ended: a refused caller may know of the refusal before it is counted."""

    def settled() -> Figures:
        end = time.monotonic() + 60
        while (seen := Figures(serving.server.metrics_address))("kvbank_requests_running"):
            assert time.monotonic() < end
        return seen

    return settled


def test_writes_and_reads_are_counted(caller: Any, scrape: Callable[[], Figures]) -> None:
    chunks = [caller.chunk(vector) for vector in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0))]
    first = caller.write(*chunks)[0].chunk_id
    caller.write(chunks[0])  # again, under its key
    header, sent = caller.retrieve([[1, 0, 0, 0], [0, 1, 0, 0]], top_k=2)
    sent |= {-chunk_id: data for chunk_id, data in caller.fetch(first).items()}
    caller.stub.DeleteChunks(pb.DeleteChunksRequest(bank="b", chunk_ids=[first, 2**60]))

    seen = scrape()
    for method, times in {
        "WriteChunks": 2,
        "Retrieve": 1,
        "FetchChunks": 1,
        "DeleteChunks": 1,
        "CreateBank": 1,
    }.items():
        assert seen("kvbank_request_seconds_count", method=method, code="OK") == times, method
    assert seen("kvbank_errors_total") == 0
    assert seen("kvbank_requests_running") == 0
    assert seen("kvbank_chunks_written_total") == 3
    assert seen("kvbank_chunks_deleted_total") == 1
    # Of the repeated write too: the bytes came in.
    assert seen("kvbank_payload_received_bytes_total", path="stream") == sum(
        len(data) for _, data in [*chunks, chunks[0]]
    )
    assert seen("kvbank_payload_sent_bytes_total", path="stream") == sum(map(len, sent.values()))
    assert seen("kvbank_in_flight_bytes") == 0
    assert seen("kvbank_query_hits_count") == 2
    assert seen("kvbank_query_hits_sum") == sum(len(query.hits) for query in header.queries) == 4
    assert seen("kvbank_query_best_score_count") == 2
    assert seen("kvbank_query_best_score_bucket", le="0.9") == 0
    assert seen("kvbank_commit_operations_sum") >= 5
    assert seen("kvbank_commit_seconds_count") == seen("kvbank_commit_operations_count") > 0
    for stage in ("store", "commit", "search", "load", "read"):
        assert seen("kvbank_stage_seconds_count", stage=stage) > 0, stage
    assert (seen("kvbank_banks"), seen("kvbank_chunks")) == (1, 2)
    assert seen("kvbank_stored_bytes") == caller.usage().bytes
    assert seen("kvbank_index_vectors") - seen("kvbank_index_tombstones") == 2
    assert seen("kvbank_disk_free_bytes") > 0
    assert seen("kvbank_process_resident_memory_bytes") > 0


def test_bytes_are_counted_by_their_path(tmp_path: Path) -> None:
    """SDKs on the same host stage what they write and read the files themselves."""
    settings = {"same_host": True, "metrics_listen": "127.0.0.1:0"}
    with (
        LocalServer(tmp_path / "data", f"unix:{tmp_path}/s", **settings) as server,
        kvbank.connect(server.address) as client,
    ):
        kv = kvbank.KVSpec("reader", layers=[0], kv_heads=2, head_dim=64, dtype="fp32")
        client.create_bank("b", kv=kv, embedding=kvbank.EmbeddingSpec("embedder", 4))
        keys = np.ones((2, 2048, 64), np.float32)
        tensors = {"k.0": keys, "v.0": keys, "pos.0": np.arange(2048, dtype=np.int32)}
        new = kvbank.NewChunk([1, 0, 0, 0], tensors)
        written = client.write("b", new, reader_digest="reader", embedder_digest="embedder")
        client.fetch("b", [written.chunk_id], reader_digest="reader")
        seen = Figures(server.metrics_address)
    size = sum(array.nbytes for array in tensors.values())
    assert seen("kvbank_payload_received_bytes_total", path="staged") == size
    assert seen("kvbank_payload_sent_bytes_total", path="file") == size
    assert seen("kvbank_payload_received_bytes_total") + seen("kvbank_payload_sent_bytes_total") == 2 * size


def test_evictions_are_counted_by_reason(caller: Any, scrape: Callable[[], Figures]) -> None:
    policy = bank_pb2.EvictionPolicy(kind=bank_pb2.POLICY_KIND_FREQUENCY, lower=10, upper=90, target=50)
    caller.create("full", capacity=bank_pb2.Capacity(chunks=20), policy=policy)
    for _ in range(21):
        caller.add(bank="full")
    reasons = Counter(
        pb.EvictionReason.Name(eviction.reason).removeprefix("EVICTION_REASON_").lower()
        for eviction in caller.stub.ListEvictions(pb.ListEvictionsRequest(bank="full")).evictions
    )
    assert reasons["oldest"] == 2
    seen = scrape()
    for reason, count in reasons.items():
        assert seen("kvbank_chunks_evicted_total", reason=reason) == count
    assert seen("kvbank_chunks_evicted_total") == caller.usage("full").chunks_evicted


def test_failures_are_counted_by_reason(
    caller: Any, scrape: Callable[[], Figures], payload_path: Callable[[int], Path]
) -> None:
    with pytest.raises(grpc.RpcError):
        caller.stub.GetBank(pb.GetBankRequest(name="nobody"))
    chunk, data = caller.chunk()
    with pytest.raises(grpc.RpcError):
        caller.write((chunk, bytes(len(data))))
    chunk_id = caller.add()
    path = payload_path(chunk_id)
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(grpc.RpcError):
        caller.fetch(chunk_id)
    seen = scrape()
    assert seen("kvbank_errors_total", method="GetBank", reason="BANK_NOT_FOUND") == 1
    assert seen("kvbank_request_seconds_count", method="GetBank", code="NOT_FOUND") == 1
    assert seen("kvbank_errors_total", method="WriteChunks", reason="CHECKSUM_IN_TRANSIT") == 1
    assert seen("kvbank_checksum_failures_total", at="write") == 1
    assert seen("kvbank_errors_total", method="FetchChunks", reason="CHECKSUM_MISMATCH") == 1
    assert seen("kvbank_checksum_failures_total", at="read") == 1
    assert seen("kvbank_chunks_quarantined_total") == 1
    assert seen("kvbank_in_flight_bytes") == 0


def test_a_second_server_counts_for_itself(caller: Any, scrape: Callable[[], Figures], tmp_path: Path) -> None:
    caller.add()
    with LocalServer(tmp_path / "other", metrics_listen="127.0.0.1:0") as other:
        seen = Figures(other.metrics_address)
        assert seen("kvbank_chunks_written_total") == 0
        assert seen("kvbank_request_seconds_count", method="WriteChunks") == 0
    assert scrape()("kvbank_chunks_written_total") == 1


def test_no_label_says_what_a_caller_wrote(caller: Any, scrape: Callable[[], Figures]) -> None:
    for i in range(30):
        metadata = (("x-request-id", f"marker-{i}"),)
        unknown = caller.channel.unary_unary(f"/kvbank.v1.MemoryService/marker{i}")
        for call in (unknown, caller.channel.unary_unary(f"/marker{i}.Service/Get")):
            with pytest.raises(grpc.RpcError):
                call(b"", metadata=metadata)
        with pytest.raises(grpc.RpcError):
            caller.stub.GetBank(pb.GetBankRequest(name=f"marker-{i}"), metadata=metadata)
        caller.create(f"marker-{i}")
    labels = scrape().labels()
    assert not {value for values in labels.values() for value in values if "marker" in value}
    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["MemoryService"].methods}
    assert labels["method"] <= methods | {"unknown"}
    assert labels["code"] <= {code.name for code in grpc.StatusCode}
    assert (
        set(labels)
        <= {"method", "code", "reason", "stage", "path", "at", "le", "version", "durability", "store"} | PLATFORM
    )


# Labels that the library's own collector sets.
PLATFORM = {"implementation", "major", "minor", "patchlevel"}


def test_stats_are_the_same_figures(caller: Any, scrape: Callable[[], Figures]) -> None:
    caller.create("c")
    caller.add()
    caller.retrieve()
    stats = caller.stub.GetStats(pb.GetStatsRequest())
    names = {sample.name for sample in stats.samples}
    assert names == {sample.name for family in scrape().families for sample in family.samples}
    assert {(s.name, s.value) for s in stats.samples} >= {("kvbank_chunks_written_total", 1), ("kvbank_banks", 2)}
    assert [found.bank.name for found in stats.banks] == ["b", "c"]
    index = stats.banks[0].index
    assert (index.kind, index.loaded, index.vectors) == (bank_pb2.INDEX_KIND_EXACT, True, 1)
    assert stats.resident_bytes > 0
    assert stats.free_bytes > 0
    assert stats.start_time.seconds > 0
    assert [found.bank.name for found in caller.stub.GetStats(pb.GetStatsRequest(banks=["c"])).banks] == ["c"]


def test_stats_of_an_unknown_bank(caller: Any, refused: Any) -> None:
    with refused("BANK_NOT_FOUND", grpc.StatusCode.NOT_FOUND):
        caller.stub.GetStats(pb.GetStatsRequest(banks=["b", "nobody"]))


def test_metrics_are_off_unless_asked_for(serving: Any) -> None:
    serving()
    assert serving.server.metrics_address == ""


@pytest.mark.parametrize(
    ("listen", "text"),
    [
        ("0.0.0.0:0", "can be reached by others"),
        ("nonsense", "neither HOST:PORT"),
        ("unix:/tmp/metrics", "not on a unix socket"),
    ],
)
def test_where_metrics_may_be(data: Path, listen: str, text: str) -> None:
    with pytest.raises(StartError, match=text):
        LocalServer(data, metrics_listen=listen)
    LocalServer(data).stop()


def test_a_taken_port_is_an_error(serving: Any, caller: Any, tmp_path: Path) -> None:
    with pytest.raises(StartError, match="cannot listen"):
        LocalServer(tmp_path / "other", metrics_listen=serving.server.metrics_address)
    LocalServer(tmp_path / "other").stop()


# The documentation


@pytest.fixture
def registered(serving: Any, tmp_path: Path) -> Mapping[str, Any]:
    """Metric -> its family, by the name that a query uses; of a service with TLS, which has some more, and with those
    of a database and a bucket."""
    authority = Authority(tmp_path / "tls")
    caller = serving(listen=f"unix:{tmp_path}/s", metrics_listen="127.0.0.1:0", **authority.settings())
    caller.create()
    caller.add()
    caller.retrieve()
    context = ssl.create_default_context(cadata=authority.pem.decode())
    families = Figures(serving.server.metrics_address, context).families
    metrics = Metrics()
    metrics.show_bucket(lambda: BucketFigures(1, 2, 3, 4))
    metrics.show_database()
    text = generate_latest(metrics.registry).decode()
    known = {found.name for found in families}
    families += [found for found in parser.text_string_to_metric_families(text) if found.name not in known]
    return {f"{found.name}_total" if found.type == "counter" else found.name: found for found in families}


def test_the_metrics_are_documented(registered: Mapping[str, Any]) -> None:
    """docs/operations.md has a row for each, with its type, labels and help."""
    text = (ROOT / "docs" / "operations.md").read_text()
    rows = re.findall(r"^\| `(kvbank_\w+)` \| (\w+) \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    documented = {name: (kind, set(re.findall(r"`(\w+)`", labels)), words) for name, kind, labels, words in rows}
    assert documented.keys() == registered.keys()
    for name, family in registered.items():
        kind, labels, words = documented[name]
        assert (kind, words) == (family.type, family.documentation), name
        found = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert found in (labels, set()), name


def test_the_dashboard_asks_for_what_exists(registered: Mapping[str, Any]) -> None:
    board = json.loads((ROOT / "docker" / "grafana" / "kvbank.json").read_text())
    known = {sample.name for family in registered.values() for sample in family.samples} | registered.keys()
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    queries += [each["query"]["query"] for each in board["templating"]["list"] if each["type"] == "query"]
    assert len(queries) > 20
    asked = {name for query in queries for name in re.findall(r"kvbank_\w+", query)}
    assert asked - known == set()
    labels = {label for query in queries for group in re.findall(r"by \((.*?)\)", query) for label in group.split(", ")}
    assert labels - {label for family in registered.values() for s in family.samples for label in s.labels} <= {
        "reason",
        "at",
        "path",
    }
