"""The page of a worker: what is served, and that it loads nothing from elsewhere."""

import http.client
import json
import re
from importlib.resources import files

import pytest

from tests.worker_http.conftest import Running

PAGE = files("model_worker.http") / "page"
NAMES = sorted(path.name for path in PAGE.iterdir())


def fetched(worker: Running, path: str, **headers: str) -> tuple[int, http.client.HTTPMessage, str]:
    connection = http.client.HTTPConnection("127.0.0.1", worker.port, timeout=60)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()
    finally:
        connection.close()


def test_the_page_and_its_files_are_served(worker: Running) -> None:
    for path in ("/", *(f"/page/{name}" for name in NAMES)):
        status, headers, text = fetched(worker, path)
        assert status == 200
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert headers["x-content-type-options"] == "nosniff"
        for other in re.findall(r'(?:src|href)="/page/([^"]+)"|from "\./([^"]+)"', text):
            assert "".join(other) in NAMES


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "unix:80", "127.0.0.1.evil.example", "[", ""])
def test_a_name_of_somebody_else_that_leads_to_this_machine_is_no_way_in(worker: Running, host: str) -> None:
    for path in ("/", "/v1/kvbank/sessions"):
        status, _, text = fetched(worker, path, host=host)
        assert (status, json.loads(text)["error"]["code"]) == (421, "misdirected_request")


@pytest.mark.parametrize("host", ["LocalHost", "127.0.0.1:80", "[::1]", "[::1]:8000"])
def test_names_of_this_machine_are(worker: Running, host: str) -> None:
    assert fetched(worker, "/", host=host)[0] == 200
    assert fetched(worker, "/", host="chat.example", authorization="Bearer of-a-proxy")[0] == 200


@pytest.mark.parametrize("path", ["/page/none.js", "/page/..%2fapp.py", "/page/", "/index.html"])
def test_nothing_else_is_served(worker: Running, path: str) -> None:
    status, headers, _ = fetched(worker, path)
    assert (status, headers["content-type"]) == (404, "application/json")


@pytest.mark.parametrize("name", NAMES)
def test_no_file_names_another_machine_or_reads_text_as_html(name: str) -> None:
    text = (PAGE / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"""https?:|["'(]//|@import|url\(""", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\bon\w+=\"", text)
    assert not re.search(r"<script(?! type=\"module\" src)|<style|style=", text)
