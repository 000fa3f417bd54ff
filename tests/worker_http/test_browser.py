"""The page of a worker in a real browser: conversations, forks, forgetting, a service that goes away, the keyboard."""

import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvbank
from memory_service.api.embedded import LocalServer
from model_worker.model import MemoryModel
from tests.support.browser import ENTER, ESCAPE, MISSING, RIGHT, TAB, Browser, browsing
from tests.worker_http.conftest import Running

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=str(MISSING))]
SAID = ["the sea is wide", "ships come and go", "<img src=x> & <b>b</b>", "and what of the sea?"]
WIDE, NARROW = (1280, 800), (400, 800)
BANNER = "document.getElementById('banner')"
# What can be reached by Tab, as a reader of the screen calls it.
FOCUSED = """
  const found = document.activeElement;
  const label = found.labels?.[0]?.innerText ?? found.getAttribute('aria-label') ?? found.innerText;
  const seen = found.matches(':focus-visible') && found.checkVisibility();
  return [found.tagName, label.trim().split('\\n')[0], seen];
"""


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def browser(window: Browser) -> Iterator[Browser]:
    """Return the browser with an empty page, which has no complaint behind the test."""
    window.open("about:blank")
    window.resize(*WIDE)
    window.complaints()
    yield window
    assert [each for each in window.complaints() if "503" not in each and "ERR_CONNECTION" not in each] == []


@pytest.fixture(scope="module")
def short(serving: Callable[..., Any]) -> Iterator[Running]:
    """Serve a model whose answers are short."""
    with serving(bounds={"new_tokens": 16}) as running:
        yield running.loaded()


@pytest.fixture(scope="module")
def talk(short: Running, window: Browser) -> str:
    """Have a conversation, and return the id of its session."""
    window.resize(*WIDE)
    window.open(short.url)
    window.wait("document.body.dataset.begun")
    for number, text in enumerate(SAID, 1):
        say(window, text, number)
    return str(window.run("return document.querySelector('[data-session][aria-current]').dataset.session"))


def say(browser: Browser, text: str, number: int) -> None:
    """Say something and wait for the answer, which is turn `number`."""
    browser.click("#message")
    browser.press(text, ENTER)
    browser.wait(f"document.getElementById('turn-{number}')?.querySelector('.why')")


def said(browser: Browser) -> list[str]:
    """Return what the reader has said, as it is shown."""
    return [line for line in browser.text(".turn .said").splitlines() if line and line != "You:"]


def opened(browser: Browser, worker: Running, session: str) -> None:
    browser.open(f"{worker.url}/#{session}")
    browser.run("location.reload()")
    browser.wait("document.querySelector('.turn .why') && document.querySelector('#why .card')")


def test_a_conversation_and_why_an_answer_came(browser: Browser, short: Running, talk: str) -> None:
    opened(browser, short, talk)
    assert said(browser) == SAID
    assert browser.run("return document.querySelectorAll('.turn img, .turn b').length") == 0
    assert browser.text("#why h3") == "Answer 4"
    shares = browser.run(
        "return [...document.querySelectorAll('#why .card strong')].map((e) => parseFloat(e.innerText))"
    )
    assert shares == sorted(shares, reverse=True)
    assert "turn 1" in browser.text("#why .card .top")
    assert "the sea" in browser.text("#why blockquote")
    browser.click("#turn-2 .why")
    browser.wait("document.querySelector('#why h3').innerText == 'Answer 2'")
    browser.click("#tab-kept")
    browser.wait("document.querySelectorAll('#kept .card').length > 2")
    browser.click("#tab-timeline")
    browser.wait("document.querySelectorAll('#timeline .written').length == 4")
    assert "Answer 4 recalled" in browser.text("#timeline .recalled")


def test_an_answer_is_stopped(browser: Browser, worker: Running) -> None:
    browser.open(worker.url)  # whose answers are long
    browser.wait("document.body.dataset.begun")
    browser.click("#message")
    browser.press("go on and on", ENTER)
    browser.wait("document.querySelector('.writing')?.innerText.length > 10")
    browser.press(ESCAPE)
    browser.wait("document.querySelector('#turn-1 .why')")
    assert "cut off" in browser.text("#turn-1 .foot")
    assert browser.run("return document.activeElement.id") == "message"


def held(browser: Browser, path: str) -> None:
    """Let the answer to what the page posts to a path wait until `release` is called in the page, or it is given up."""
    script = """
      const [path, real] = [arguments[0], window.fetch];
      window.fetch = async (to, options) => {
        if (to === path) await new Promise((go, fail) => {
          window.release = go;
          options.signal?.addEventListener('abort', () => fail(options.signal.reason));
        });
        return real(to, options);
      };
    """
    browser.run(script, path)


def test_what_is_opened_meanwhile_stays_open(browser: Browser, short: Running, talk: str) -> None:
    browser.open(short.url)
    browser.wait("document.body.dataset.begun")
    held(browser, "/v1/conversations")
    browser.click("#message")
    browser.press("who hears this?", ENTER)
    browser.wait("typeof window.release == 'function'")
    browser.click(f"[data-session='{talk}']")
    browser.wait(f"location.hash == '#{talk}'")
    browser.run("window.release()")
    browser.wait("document.getElementById('stop').hidden")
    browser.click("#fork")
    assert "up to turn 4" in browser.text("#dialog")
    browser.press(ESCAPE)


def test_what_is_stopped_before_its_turn_came_stands_in_the_message_again(browser: Browser, short: Running) -> None:
    browser.open(short.url)
    browser.wait("document.body.dataset.begun")
    held(browser, "/v1/responses")
    browser.click("#message")
    browser.press("not yet", ENTER)
    browser.wait("typeof window.release == 'function'")
    browser.press(ESCAPE)
    browser.wait("document.getElementById('message').value == 'not yet'")
    assert said(browser) == []


def test_a_fork_goes_its_own_way(browser: Browser, short: Running, talk: str) -> None:
    opened(browser, short, talk)
    browser.click("[aria-label='Fork behind turn 2']")
    browser.press("another way", ENTER)
    browser.wait("document.getElementById('title').innerText == 'another way'")
    assert said(browser) == SAID[:2]
    say(browser, "and the land?", 3)
    below = f"document.querySelector('[data-session=\"{talk}\"]').parentElement.querySelector('ul [aria-current]')"
    assert "another way" in browser.wait(f"{below}?.innerText")
    browser.click("#origin button")
    browser.wait("document.querySelectorAll('.turn .said').length == 4")


def test_a_turn_is_forgotten_with_a_receipt(browser: Browser, short: Running, address: str) -> None:
    browser.open(short.url)
    browser.wait("document.body.dataset.begun")
    for number, text in enumerate(SAID[:3], 1):
        say(browser, text, number)
    session = browser.run("return document.querySelector('[data-session][aria-current]').dataset.session")
    browser.click("[aria-label='Forget turn 1']")
    assert browser.run("return document.activeElement.innerText") == "Cancel"
    browser.press(ESCAPE)
    assert "the sea is wide" in browser.text(".turn")
    browser.click("[aria-label='Forget turn 1']")
    browser.click("#dialog .danger")
    browser.wait("document.querySelector('#dialog .receipt')")
    assert "1 turn," in browser.text("#dialog .receipt")
    browser.press(ENTER)
    browser.wait("document.querySelector('.turn.forgotten')")
    shown = "[...document.querySelectorAll('.talk, .memory, [data-session][aria-current]')].map((e) => e.innerText)"
    browser.wait(f"!{shown}.join().includes('the sea is wide')")
    with kvbank.connect(address) as client:
        first = next(client.sessions.turns(session))
    assert (first.status, first.items) == ("forgotten", ())
    browser.click("#delete")
    browser.click("#dialog .danger")
    browser.wait("document.querySelector('#dialog .receipt')")
    browser.press(ENTER)
    browser.wait(f"!document.querySelector('[data-session=\"{session}\"]')")


def test_a_conversation_goes_on_behind_an_earlier_turn(browser: Browser, short: Running) -> None:
    browser.open(short.url)
    browser.wait("document.body.dataset.begun")
    for number, text in enumerate(SAID[:3], 1):
        say(browser, text, number)
    assert browser.run("return document.querySelectorAll('[aria-label^=Rewind]').length") == 2
    browser.run("document.querySelector('[aria-label=\"Rewind to turn 1\"]').focus()")
    browser.press(ENTER)
    assert browser.run("return document.activeElement.innerText") == "Cancel"
    assert "after turn 1" in browser.text("#dialog")
    browser.press(TAB, ENTER)
    browser.wait("document.querySelectorAll('.turn .said').length == 1 && !document.getElementById('dialog').open")
    assert browser.run("return document.activeElement.id") == "title"
    say(browser, "another way", 2)
    assert said(browser) == [SAID[0], "another way"]


def test_a_document_is_forgotten_where_an_answer_has_read_it(
    browser: Browser, short: Running, address: str, model_folder: Path
) -> None:
    with (
        kvbank.connect(address) as client,
        MemoryModel.from_pretrained(str(model_folder), memory=client, bank="library") as model,
    ):
        model.read("the sea is wide and ships come and go. " * 20, memory=model.with_bank("library"), source="sea.md")
        browser.open(short.url)
        browser.wait("document.body.dataset.begun")
        say(browser, SAID[1], 1)
        session = browser.wait("document.querySelector('[data-session][aria-current]')?.dataset.session")
        client.sessions.update(session, reads=["library"])
        say(browser, SAID[0], 2)
        browser.wait("document.querySelector('#why .card .top')?.innerText.includes('sea.md')")
        browser.click("[aria-label='Forget the document sea.md']")
        assert "library" in browser.text("#dialog")
        browser.click("#dialog .danger")
        browser.wait("document.querySelector('#dialog .receipt')")
        browser.press(ENTER)
        browser.wait("document.querySelector('#why .card')?.innerText.includes('no longer in the memory')")
        assert list(client.list_chunks("library")) == []


def test_what_went_wrong_is_said_until_the_reader_goes_on(browser: Browser, short: Running, talk: str) -> None:
    """Let the service be away for one call, then let another one fail: the page is well again before that is read."""
    opened(browser, short, talk)
    refusing = """
      const real = window.fetch, codes = [...arguments[0]];
      window.fetch = async (to, options) => {
        if (to === '/v1/models') window.well = true;
        if (!String(to).endsWith('/timeline') || !codes.length) return real(to, options);
        const [status, code, message] = codes.shift();
        return new Response(JSON.stringify({ error: { code, message } }), { status });
      };
    """
    browser.run(refusing, [[503, "memory_unavailable", "away"], [503, "other", "something else is wrong"]])
    browser.click("#tab-timeline")
    browser.wait(f"{BANNER}.innerText.startsWith('The memory service is away')")
    browser.click("#tab-kept")
    browser.click("#tab-timeline")
    browser.wait(f"{BANNER}.innerText == 'Something else is wrong.'")
    browser.wait("window.well")
    browser.run("return fetch('/healthz').then(() => 0)")  # what the page asked before is answered then
    assert browser.text("#banner") == "Something else is wrong."
    browser.click("#new")
    browser.wait(f"{BANNER}.hidden")


def test_a_service_that_goes_away_and_comes_back(browser: Browser, serving: Callable[..., Any], tmp_path: Path) -> None:
    service = LocalServer(tmp_path, listen="127.0.0.1:0", durability="os")
    try:
        with serving(target=service.address, bounds={"new_tokens": 16}) as running:
            browser.open(running.loaded().url)
            browser.wait("document.body.dataset.begun")
            say(browser, SAID[0], 1)
            service.stop()
            browser.click("#message")
            browser.press(SAID[1], ENTER)
            browser.wait(f"{BANNER}.innerText.startsWith('The memory service is away')")
            browser.wait(f"document.getElementById('message').value == '{SAID[1]}'")
            assert said(browser) == SAID[:1]
            service = LocalServer(tmp_path, listen=service.address, durability="os")
            browser.wait(f"{BANNER}.hidden")
            browser.press(ENTER)
            browser.wait("document.querySelector('#turn-2 .why')")
    finally:
        service.stop()


def test_a_model_that_is_being_loaded(browser: Browser, serving: Callable[..., Any]) -> None:
    hold = threading.Event()
    with serving(hold=hold) as running:
        browser.open(running.url)
        browser.wait(f"{BANNER}.innerText.startsWith('The model is being loaded')")
        hold.set()
        browser.wait("document.body.dataset.begun")
        assert browser.run(f"return {BANNER}.hidden")


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(
    browser: Browser, serving: Callable[..., Any], tmp_path: Path
) -> None:
    with LocalServer(tmp_path, listen="127.0.0.1:0", durability="os") as service:
        with kvbank.connect(service.address) as owner:
            key = owner.access.create_key("write").secret
        with serving(target=service.address) as running:
            browser.open(running.loaded().url)
            browser.wait("document.getElementById('dialog-input')")
            browser.press(key, ENTER)
            browser.wait("document.body.dataset.begun")
            assert browser.run("return [Object.keys(localStorage), document.cookie]") == [[], ""]
            assert browser.run("return Object.values(sessionStorage)") == [key]
    browser.complaints()  # that the key was asked for


def test_all_can_be_done_by_keyboard(browser: Browser, short: Running, talk: str) -> None:
    opened(browser, short, talk)
    browser.run("document.querySelector('.skip').focus()")
    reached = [browser.run(FOCUSED)]
    for _ in range(60):
        browser.press(TAB)
        reached.append(browser.run(FOCUSED))
        if reached[-1][1] == "Why":
            break
    names = [name for _, name, _ in reached]
    wanted = ["Skip to your message", "Key", "New", "Fork", "Forget all", "What was said", "Why this answer"]
    places = [names.index(name) for name in [*wanted, "Your message", "Send", "Why"]]
    assert places == sorted(places)  # as the page is read
    assert [name for _, name, seen in reached if not seen] == []
    browser.run("document.getElementById('tab-why').focus()")
    browser.press(RIGHT)
    assert browser.run(FOCUSED)[1] == "Memory"
    browser.wait("document.querySelector('#kept .card')")
    browser.run("document.querySelector('[aria-label=\"Forget turn 2\"]').focus()")
    browser.press(ENTER)
    browser.press(TAB, TAB)  # a dialogue keeps the focus
    assert browser.run("return document.activeElement.closest('dialog, body').id") in ("dialog", "")
    browser.press(ESCAPE)
    assert browser.run(FOCUSED)[1] == "Forget turn 2"


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the source of axe-core, which npm fetches where there is none."""
    if not (npm := shutil.which("npm")):
        pytest.skip("there is no npm, which fetches axe-core")
    folder = tmp_path_factory.mktemp("axe")
    command = [npm, "install", "--prefix", str(folder), "--no-audit", "--no-fund", "--ignore-scripts", "axe-core@4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        pytest.skip(f"npm could not fetch axe-core: {done.stderr[-200:]}")
    return (folder / "node_modules/axe-core/axe.min.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_axe_finds_nothing(
    browser: Browser, short: Running, talk: str, axe: str, scheme: str, size: tuple[int, int]
) -> None:
    browser.prefer(scheme)
    browser.resize(*size)
    opened(browser, short, talk)
    views = ["sessions", "talk", "memory"] if size == NARROW else [""]
    for view in views:
        if view:
            browser.click(f".views [data-view={view}]")
            assert browser.run("return document.documentElement.scrollWidth") <= size[0]
        for tab in ("",) if view in ("sessions", "talk") else ("kept", "timeline", "why"):
            if tab:
                browser.click(f"#tab-{tab}")
                browser.wait(f"document.querySelector('#{tab} h3')")
            assert findings(browser, axe) == []
    if size == WIDE:
        for label in ("Forget turn 1", "Rewind to turn 1"):
            browser.click(f"[aria-label='{label}']")
            assert findings(browser, axe) == []
            browser.press(ESCAPE)


def findings(browser: Browser, axe: str) -> list[Any]:
    """Return what axe finds in the page as it is, by rule, with the elements."""
    script = f"{axe}; return axe.run().then((found) => JSON.stringify(found.violations))"
    return [(each["id"], [node["html"] for node in each["nodes"]]) for each in json.loads(browser.run(script))]
