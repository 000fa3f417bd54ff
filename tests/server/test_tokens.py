"""Callers with tokens of an identity provider: which are let in, as whom, and that all others are refused alike."""

import base64
import http.client
import http.server
import json
import queue
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

import kvbank
from kvbank.v1 import service_pb2, service_pb2_grpc
from memory_service.api.embedded import LocalServer
from memory_service.domain.errors import StartError
from memory_service.domain.limits import Limits
from tests.support.certificates import Authority
from tests.support.clocks import SECOND, Hands
from tests.support.diagonal import rotated
from tests.support.waiting import wait_until

AUDIENCE = "kvbank"
NO_PAUSE = Limits(wrong_key_s=0.0, token_keys_seldom_s=0.0)
ED, RSA = ed25519.Ed25519PrivateKey.generate(), rsa.generate_private_key(65537, 2048)


def jwk(key: Any, name: str, **more: str) -> dict[str, Any]:
    kind: Any = jwt.algorithms.RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else jwt.algorithms.OKPAlgorithm
    return {**kind.to_jwk(key.public_key(), as_dict=True), "kid": name, "use": "sig", **more}


def claims(**changes: Any) -> dict[str, Any]:
    """Return the claims of a good token with these changes; None takes a claim away."""
    good = {"sub": "ann", "aud": AUDIENCE, "exp": int(time.time()) + 3600, "iss": "https://idp", "tenant": "default"}
    return {name: value for name, value in {**good, "role": "write", **changes}.items() if value is not None}


def token(key: Any = ED, algorithm: str = "EdDSA", kid: str | None = "ed", **changes: Any) -> str:
    return jwt.encode(claims(**changes), key, algorithm, headers={"kid": kid} if kid else None)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": [jwk(ED, "ed"), jwk(RSA, "rsa")]}))
    return path


@pytest.fixture
def server(tmp_path: Path, keys: Path) -> Iterator[LocalServer]:
    settings = {"jwt_jwks": str(keys), "jwt_audience": AUDIENCE, "jwt_issuer": "https://idp"}
    with LocalServer(tmp_path / "data", limits=NO_PAUSE, **settings) as server:
        yield server


def who(server: LocalServer, credential: str | None) -> kvbank.Identity:
    with kvbank.connect(server.address, api_key=credential) as client:
        return client.access.whoami()


def test_a_token_says_tenant_and_role(server: LocalServer) -> None:
    for role in ("read", "write", "admin", "operator"):
        found = who(server, token(role=role))
        assert (found.tenant, found.roles, found.key_id) == ("default", (role,), "")
    assert who(server, token(RSA, "RS256", "rsa")).roles == ("write",)
    assert who(server, token(aud=["other", AUDIENCE])).roles == ("write",)
    with kvbank.connect(server.address, api_key=token(role="read")) as client:
        with pytest.raises(kvbank.PermissionDenied):
            client.create_bank("b", kv=None, embedding=kvbank.EmbeddingSpec("e", 4))
        assert list(client.list_banks()) == []


def test_keys_go_on_beside_tokens(server: LocalServer) -> None:
    with kvbank.connect(server.address, api_key=token(role="admin")) as admin:
        key = admin.access.create_key("read").secret
    assert who(server, key).roles == ("read",)
    with pytest.raises(kvbank.Unauthenticated):
        who(server, None)


@contextmanager
def writing(server: LocalServer, credential: str) -> Iterator[Any]:
    """Make a call that is under way when the block begins, and goes on as long as it is let."""
    sent: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with grpc.insecure_channel(server.address) as channel:
        stub, metadata = service_pb2_grpc.MemoryServiceStub(channel), [("api-key", credential)]
        stream = stub.WriteChunks(iter(sent.get, None), metadata=metadata, timeout=60)
        stub.GetServerInfo(service_pb2.GetServerInfoRequest(), metadata=metadata, timeout=60)
        assert stream.is_active()
        yield stream
        sent.put(None)


def test_a_call_under_way_ends_with_its_token_or_the_end_of_its_key(tmp_path: Path, keys: Path) -> None:
    hands, limits = Hands(), Limits(wrong_key_s=0.0, call_ends_s=0.02)
    settings = {"jwt_jwks": str(keys), "jwt_audience": AUDIENCE}
    with LocalServer(tmp_path / "data", limits=limits, clock=hands.clock(), **settings) as server:
        with kvbank.connect(server.address, api_key=token(role="admin")) as admin:
            ttl = timedelta(seconds=1000)
            key = admin.access.create_key("write", ttl=ttl).secret
        now = hands.wall // SECOND
        with (
            writing(server, token(exp=now + 1000)) as first,
            writing(server, key) as second,
            writing(server, token(exp=now + 2000)) as later,
        ):
            hands.go_on(1000 * SECOND)
            for ended in (first, second):
                with pytest.raises(grpc.RpcError) as caught:
                    next(ended)
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert later.is_active()


def test_a_call_under_way_ends_with_the_tenant_of_its_token(tmp_path: Path, keys: Path) -> None:
    settings = {"jwt_jwks": str(keys), "jwt_audience": AUDIENCE}
    with (
        LocalServer(tmp_path / "data", limits=Limits(key_looked_at_s=0.02), **settings) as server,
        kvbank.connect(server.address, api_key=token(role="operator")) as operator,
    ):
        operator.access.create_tenant("blue")
        with writing(server, token()) as ours, writing(server, token(tenant="blue")) as theirs:
            operator.access.delete_tenant("blue")
            with pytest.raises(grpc.RpcError) as caught:
                next(theirs)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert ours.is_active()


def public_pem(key: Any) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))


def forged(header: Mapping[str, Any], secret: bytes = b"") -> str:
    """Return a token that a library would not make: of any header, signed by HMAC where there is a secret."""
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (header, claims())]
    signature = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256).sign(b".".join(parts), secret)
    return b".".join([*parts, base64.urlsafe_b64encode(signature).rstrip(b"=") if secret else b""]).decode()


WRONG: dict[str, Callable[[], str]] = {
    "no end": lambda: token(exp=None),
    "its end is over": lambda: token(exp=int(time.time()) - 1),
    "an end that is no number": lambda: token(exp="tomorrow"),
    "not yet": lambda: token(nbf=int(time.time()) + 3600),
    "no audience": lambda: token(aud=None),
    "another audience": lambda: token(aud="kvban"),
    "no issuer": lambda: token(iss=None),
    "another issuer": lambda: token(iss="https://idp.evil"),
    "no tenant": lambda: token(tenant=None),
    "an empty tenant": lambda: token(tenant=""),
    "several tenants": lambda: token(tenant=["default"]),
    "a tenant that is not there": lambda: token(tenant="blue"),
    "no role": lambda: token(role=None),
    "another role": lambda: token(role="owner"),
    "several roles": lambda: token(role=["admin", "operator"]),
    "another key": lambda: token(ed25519.Ed25519PrivateKey.generate()),
    "a key that is not there": lambda: token(kid="none"),
    "no name of a key, of two": lambda: token(kid=None),
    "the key of the other algorithm": lambda: token(RSA, "RS256", "ed"),
    "RSA of another hash": lambda: token(RSA, "RS512", "rsa"),
    "an elliptic curve": lambda: token(ec.generate_private_key(ec.SECP256R1()), "ES256", "ed"),
    "no signature": lambda: forged({"alg": "none", "kid": "ed"}),
    "no signature, said in capitals": lambda: forged({"alg": "NONE", "kid": "ed"}),
    "the public key as a secret": lambda: forged({"alg": "HS256", "kid": "rsa"}, public_pem(RSA)),
    "a header of lists in lists": lambda: base64.urlsafe_b64encode(b"[" * 2000).decode() + ".e30.x",
    "a header that is no object": lambda: forged(["alg"]),  # type: ignore[arg-type]
    "half a token": lambda: token()[:60],
    "another end": lambda: token()[:-8] + "AAAAAAAA",
    "two tokens": lambda: f"{token()}.{token()}",
    "words": lambda: "certificate",
}


@pytest.mark.parametrize("wrong", rotated([*WRONG], 0, every=2))
def test_every_other_token_is_refused_in_the_same_words(server: LocalServer, wrong: str) -> None:
    with pytest.raises(kvbank.Unauthenticated, match=r"^the call needs a key that is valid here$"):
        who(server, WRONG[wrong]())


def test_new_keys_of_the_provider_are_taken_up(server: LocalServer, keys: Path) -> None:
    new = ed25519.Ed25519PrivateKey.generate()
    with pytest.raises(kvbank.Unauthenticated):
        who(server, token(new, kid="new"))
    keys.write_text(json.dumps({"keys": [jwk(new, "new")]}))
    assert who(server, token(new, kid="new")).roles == ("write",)
    assert who(server, token(new, kid=None, sub="bob")).roles == ("write",)
    with pytest.raises(kvbank.Unauthenticated):
        who(server, token(sub="carl"))
    # What cannot be read leaves the keys of before.
    keys.write_text("{")
    assert who(server, token(new, kid="new", sub="dora")).roles == ("write",)


def test_a_key_that_is_not_for_signatures_signs_nothing(server: LocalServer, keys: Path) -> None:
    keys.write_text(json.dumps({"keys": [jwk(ED, "ed", use="enc"), jwk(RSA, "rsa", alg="RS512")]}))
    for wrong in (token(sub="x"), token(RSA, "RS256", "rsa"), token(RSA, "RS512", "rsa"), token(kid="new")):
        with pytest.raises(kvbank.Unauthenticated):
            who(server, wrong)


@contextmanager
def provider(
    authority: Authority, content: Iterable[bytes], before: Callable[[], object] = lambda: None
) -> Iterator[str]:
    """Serve some content, in pieces, over https. before: what is waited for before each answer."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            before()
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):  # the client has gone
                for piece in content:
                    self.wfile.write(piece)

        def log_message(self, *_: Any) -> None:
            pass

    found = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue("localhost").configure_cert(context)
    found.socket = context.wrap_socket(found.socket, server_side=True)
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"https://localhost:{found.server_port}/keys"
    finally:
        found.shutdown()
        thread.join()
        found.server_close()


def test_keys_come_over_https(tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path / "tls")
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    with provider(authority, [keys.read_bytes()]) as address:
        settings = {"jwt_jwks": address, "jwt_audience": AUDIENCE}
        with LocalServer(tmp_path / "data", limits=NO_PAUSE, **settings) as server:
            assert who(server, token(iss=None)).roles == ("write",)
        monkeypatch.setenv("SSL_CERT_FILE", str(Authority(tmp_path / "other").file))
        with (
            LocalServer(tmp_path / "data", limits=NO_PAUSE, **settings) as server,
            pytest.raises(kvbank.Unauthenticated),
        ):
            who(server, token())


def test_a_provider_that_does_not_answer_holds_up_nobody(
    tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fetch the keys for each token, of which one waits for the provider: the others go by the keys of before."""
    authority = Authority(tmp_path / "tls")
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    answering, asked = threading.Event(), queue.SimpleQueue[bool]()
    answering.set()

    def before() -> None:
        asked.put(True)
        answering.wait()

    limits = Limits(wrong_key_s=0.0, token_keys_old_s=0.0, token_keys_patience_s=600.0)
    with provider(authority, [keys.read_bytes()], before) as address, ThreadPoolExecutor(1) as threads:
        settings = {"jwt_jwks": address, "jwt_audience": AUDIENCE}
        with LocalServer(tmp_path / "data", limits=limits, **settings) as server:
            key_maker = token(role="admin")
            with kvbank.connect(server.address, api_key=key_maker) as admin:
                key = admin.access.create_key("read").secret
            answering.clear()
            while not asked.empty():
                asked.get()
            first = threads.submit(who, server, token(sub="first"))
            try:
                assert asked.get(timeout=60)
                for credential in (token(sub="second"), key, key_maker, token(RSA, "RS256", "rsa")):
                    assert who(server, credential).tenant == "default"
                assert not first.done()
            finally:
                answering.set()
            assert first.result(60).tenant == "default"


def test_who_goes_while_its_token_is_looked_at_leaves_threads_to_others(
    tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Have calls of one host wait for the provider, and go: keys of the same host and of another one find a thread."""
    authority = Authority(tmp_path / "tls")
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    answering, asked = threading.Event(), queue.SimpleQueue[bool]()
    answering.set()

    def before() -> None:
        asked.put(True)
        answering.wait()

    limits = Limits(wrong_key_s=0.0, token_keys_seldom_s=0.0, token_keys_patience_s=600.0)
    settings = {"jwt_audience": AUDIENCE, "insecure": True, "metrics_listen": "0.0.0.0:0"}
    with (
        provider(authority, [keys.read_bytes()], before) as address,
        LocalServer(tmp_path / "data", limits=limits, jwt_jwks=address, **settings) as server,
    ):
        with kvbank.connect(server.address, api_key=token(role="operator")) as operator:
            key = operator.access.create_key("operator").secret
            beside = operator.access.create_key("read").secret
        answering.clear()
        while not asked.empty():
            asked.get()
        try:
            with grpc.insecure_channel(server.address) as channel:
                ask = channel.unary_unary("/kvbank.v1.MemoryService/GetServerInfo")
                for number in range(5):
                    with pytest.raises(grpc.RpcError) as caught:
                        ask(b"", metadata=[("api-key", token(kid=f"new {number}"))], timeout=0.2)
                    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert asked.get(timeout=60)
            assert who(server, beside).roles == ("read",)
            port = int(server.metrics_address.rpartition(":")[2])
            other = http.client.HTTPConnection("127.0.0.1", port, timeout=10, source_address=("127.0.0.2", 0))
            with closing(other):
                other.request("GET", "/metrics", headers={"api-key": key})
                assert other.getresponse().status == http.HTTPStatus.OK
        finally:
            answering.set()


def test_an_answer_without_an_end_is_given_up(
    tmp_path: Path, keys: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Have a provider send the keys, then spaces: fast, so that they are too many, or slowly."""
    authority = Authority(tmp_path / "tls")
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    ended = threading.Event()

    def spaces(size: int, pause_s: float) -> Iterator[bytes]:
        while not ended.wait(pause_s):
            yield b" " * size

    limits = Limits(wrong_key_s=0.0, token_keys_seldom_s=0.0, token_keys_patience_s=0.5)
    for size, pause_s, why in (
        (1 << 18, 0.0, "it has more than 1048576 bytes"),
        (1, 0.05, "it has not ended after 0.5 s"),
    ):
        content = chain([keys.read_bytes()], spaces(size, pause_s))
        with provider(authority, content) as address:
            settings = {"jwt_jwks": address, "jwt_audience": AUDIENCE}
            with LocalServer(tmp_path / f"data-{size}", limits=limits, **settings) as server:
                with pytest.raises(kvbank.Unauthenticated):
                    who(server, token())
                wait_until(lambda why=why: why in caplog.text)  # type: ignore[misc]
            ended.set()
        ended.clear()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"jwt_jwks": "{keys}"}, "give both, --jwt-jwks and --jwt-audience"),
        ({"jwt_audience": AUDIENCE}, "give both, --jwt-jwks and --jwt-audience"),
        ({"jwt_jwks": "http://idp/keys", "jwt_audience": AUDIENCE}, "--jwt-jwks is a file or an https address"),
        ({"jwt_jwks": "/no/such/file", "jwt_audience": AUDIENCE}, "cannot use the keys of /no/such/file: No such file"),
        ({"jwt_jwks": __file__, "jwt_audience": AUDIENCE}, "cannot use the keys of"),
        ({"jwt_jwks": "{keys}", "jwt_audience": AUDIENCE, "jwt_role_claim": ""}, "the claims of tenant and role have"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, keys: Path, settings: dict[str, str], text: str) -> None:
    with pytest.raises(StartError, match=text):
        LocalServer(tmp_path / "data", **{name: value.format(keys=keys) for name, value in settings.items()})
