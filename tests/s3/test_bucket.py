"""What a bucket promises: an object is made once, whatever is lost on the way, and what fails is one clear error."""

import traceback

import pytest

from memory_service.domain.errors import StartError, refusal_for
from memory_service.domain.limits import ObjectLimits
from memory_service.storage.s3.bucket import Bucket
from memory_service.storage.s3.location import Location, parse
from tests.support.bucket import CUT, DEAF, PAST, endpoint, faulty
from tests.support.certificates import Authority

# Each failure is final at once.
NO_PATIENCE = ObjectLimits(patience_s=0, request_s=30)


def test_the_place_is_read_as_an_operator_writes_it():
    assert parse("s3://models/a/b/") == Location("models", "a/b")
    assert str(parse("s3://models")) == "s3://models"
    for wrong in ("s3://", "s3:/models", "s3://UP", "s3://models/a//b", "s3://models/..", "s3://models/a b", "models"):
        with pytest.raises(StartError):
            parse(wrong)


def test_what_is_made_is_read_by_ranges_with_its_size(bucket):
    bucket.put_new("a/1", [b"head", memoryview(b"body")])
    assert bucket.read("a/1", 2, 6) == (b"adbo", 8)
    assert bucket.read("a/1", 6, 99) == (b"dy", 8)
    assert bucket.read("a/1", 8, 99) == (b"", 8)
    assert bucket.size("a/1") == 8
    for ask in (lambda: bucket.read("a/2", 0, 1), lambda: bucket.size("a/2")):
        with pytest.raises(FileNotFoundError):
            ask()


def test_an_object_is_made_once(bucket):
    bucket.put_new("a/1", [b"first"])
    bucket.put_new("a/1", [b"fi", b"rst"])
    for other in (b"First", b"first and more", b"fir"):
        with pytest.raises(FileExistsError):
            bucket.put_new("a/1", [other])
    assert bucket.read("a/1", 0, 9).data == b"first"
    bucket.put("a/1", [b"written over"])
    assert bucket.read("a/1", 0, 99).data == b"written over"


def test_keys_are_listed_in_order_and_from_one_on_in_pages(bucket, monkeypatch):
    monkeypatch.setattr("memory_service.storage.s3.bucket._PAGE", 2)
    keys = [f"a/{number:03}" for number in (7, 1, 30, 4, 100)]
    for key in [*keys, "ab/1"]:
        bucket.put_new(key, [key.encode()])
    pages = list(bucket.pages("a"))
    assert [item.key for page in pages for item in page] == sorted(keys)
    assert max(map(len, pages)) == 2
    assert {item.size for page in pages for item in page} == {5}
    assert [item.key for page in bucket.pages("a", "a/007") for item in page] == ["a/030", "a/100"]
    bucket.delete([*keys, "a/never"])
    assert list(bucket.pages("a")) == []
    assert bucket.size("ab/1") == 4


@pytest.mark.parametrize(
    "fault", [(500, "InternalError"), (503, "SlowDown"), (429, "X"), (400, "RequestTimeout"), PAST]
)
def test_what_fails_in_passing_is_asked_again(bucket, through, proxy, fault):
    again = through()
    proxy.faults = [fault, (500, "InternalError"), (429, "X")]
    again.put_new("a/1", [b"12345"])
    assert bucket.read("a/1", 0, 9).data == b"12345"
    for ask in (
        lambda: again.read("a/1", 1, 3).data == b"23",
        lambda: again.size("a/1") == 5,
        lambda: [item.key for page in again.pages("a") for item in page] == ["a/1"],
        lambda: again.delete(["a/1"]) is None,
    ):
        proxy.faults, proxy.seen = [fault], []
        assert ask()
        assert len(proxy.seen) >= 2


def test_a_write_whose_answer_was_lost_is_made_once(bucket, through, proxy):
    proxy.faults = [PAST]
    through().put_new("a/1", [b"12345"])
    assert [request.split()[0] for request in proxy.seen] == ["PUT", "PUT", "GET", "GET"]
    proxy.faults = [PAST]
    with pytest.raises(FileExistsError):
        through().put_new("a/1", [b"other"])


def test_a_conflict_with_another_request_is_tried_again(bucket, through, proxy):
    proxy.faults = [(409, "ConditionalRequestConflict")]
    through().put_new("a/1", [b"12345"])
    assert bucket.read("a/1", 0, 9).data == b"12345"


def test_a_body_that_is_cut_is_no_shorter_object(bucket, through, proxy):
    bucket.put_new("a/1", [bytes(200_000)])
    proxy.faults = [CUT, CUT]
    assert through().read("a/1", 0, 200_000) == (bytes(200_000), 200_000)
    proxy.answers = lambda _request: CUT
    with pytest.raises(OSError, match="cannot be reached, or cuts connections") as caught:
        through(NO_PATIENCE).read("a/1", 0, 200_000)
    assert not isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        ((403, "SignatureDoesNotMatch"), PermissionError, r"refuses the credentials \(403 SignatureDoesNotMatch\)$"),
        ((401, "InvalidToken"), PermissionError, r"refuses the credentials \(401 InvalidToken\)$"),
        ((503, "SlowDown"), OSError, r"answers with an error \(503 SlowDown\)$"),
        ((501, "NotImplemented"), OSError, r"answers with an error \(501 NotImplemented\)$"),
        ((301, "PermanentRedirect"), OSError, "is in another region; set AWS_REGION$"),
        ((404, "NoSuchBucket"), OSError, "^.Errno 19. the bucket of s3://kvbank-test/.* is not there$"),
    ],
)
def test_what_does_not_pass_is_one_line_without_secrets(through, proxy, fault, kind, text):
    proxy.answers = lambda _request: fault
    impatient = through(NO_PATIENCE)
    for ask in (
        lambda: impatient.put_new("a/1", [b"1"]),
        lambda: impatient.read("a/1", 0, 1),
        lambda: list(impatient.pages("a")),
        lambda: impatient.delete(["a/1"]),
        lambda: impatient.size("a/1"),
    ):
        with pytest.raises(kind, match=text) as caught:
            ask()
        assert "AccessKeyId" not in "".join(traceback.format_exception(caught.value))
        assert not isinstance(caught.value, FileNotFoundError)
        assert refusal_for(caught.value).reason == "STORAGE_ERROR"


def test_what_does_not_pass_is_not_tried_again(through, proxy):
    proxy.answers = lambda _request: (403, "AccessDenied")
    with pytest.raises(PermissionError):
        through().put_new("a/1", [b"1"])
    assert len(proxy.seen) == 1


def test_an_object_that_cannot_be_deleted_is_an_error(bucket, through, proxy):
    bucket.put_new("a/1", [b"1"])
    proxy.faults = [(200, "InternalError")]
    through().delete(["a/1"])
    assert list(bucket.pages("a")) == []
    proxy.seen, proxy.faults = [], [(200, "AccessDenied")]
    with pytest.raises(PermissionError, match=r"refuses the credentials \(AccessDenied\)"):
        through().delete(["a/1"])
    assert len(proxy.seen) == 1


def test_an_answer_that_makes_the_library_panic_is_an_error(through, proxy, capfd):
    proxy.faults = [b"<DeleteResult><Error><Key>other</Key><Code>X</Code><Message>no</Message></Error></DeleteResult>"]
    with pytest.raises(OSError, match="answers what is no answer"):
        through().delete(["a/1"])
    capfd.readouterr()


def test_a_service_that_does_not_answer_is_given_up(bucket, through, proxy):
    proxy.answers = lambda _request: DEAF
    with pytest.raises(TimeoutError, match="does not answer in time"):
        through(ObjectLimits(request_s=0.05, patience_s=0)).put_new("a/1", [b"1"])


def test_nobody_at_the_endpoint_is_one_line(bucket):
    closed = Bucket(bucket.location, NO_PATIENCE, "http://127.0.0.1:1")
    with pytest.raises(OSError, match=r"s3://\S+ cannot be reached"):
        closed.size("a/1")


def test_an_authority_of_ones_own_is_named_by_the_usual_variable(bucket, tmp_path, monkeypatch):
    authority = Authority(tmp_path)
    bucket.put_new("a/1", [b"1"])
    with faulty(authority.put(authority.issue("127.0.0.1"))) as proxy:
        with pytest.raises(OSError, match="cannot be reached"):
            Bucket(bucket.location, NO_PATIENCE, proxy.url).size("a/1")
        monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.file))
        assert Bucket(bucket.location, NO_PATIENCE, proxy.url).size("a/1") == 1
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "none"))
    with pytest.raises(StartError, match=r"cannot read AWS_CA_BUNDLE .*none: No such file"):
        Bucket(bucket.location)


def test_an_environment_that_makes_no_sense_is_one_line(bucket, tmp_path, monkeypatch):
    for wrong in ("nonsense", "ftp://host", "http://", "http://[bad"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", wrong)
        with pytest.raises(StartError, match=r"^what the environment says of s3://\S+ cannot be used: .+$"):
            Bucket(bucket.location)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://host")
    for garbage in ("garbage", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
        (tmp_path / "pem").write_text(garbage)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "pem"))
        with pytest.raises(StartError, match="cannot be used"):
            Bucket(bucket.location)


def test_the_endpoint_is_that_of_the_environment(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint())
    bucket.put_new("a/1", [b"1"])
    assert Bucket(bucket.location).size("a/1") == 1
