"""A real browser in tests: Chromium, asked over WebDriver (https://www.w3.org/TR/webdriver2) without a library.

`apt install chromium chromium-driver` has both programs. Where they are not, tests say so and are skipped.
"""

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DRIVER, PROGRAM = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
MISSING = None if DRIVER and PROGRAM else "there is no browser: apt install chromium chromium-driver"
ENTER, TAB, ESCAPE, RIGHT = "\ue007", "\ue004", "\ue00c", "\ue014"
_SHIFT = "\ue008"
_PATIENCE = 60.0
_ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-color-profile=srgb"]


class Browser:
    """A window of the browser. address: of the session at the driver."""

    def __init__(self, address: str) -> None:
        self._address = address

    def _ask(self, path: str, body: Any = None, method: str = "POST") -> Any:
        return _asked(f"{self._address}{path}", method, {} if body is None else body)

    def open(self, url: str) -> None:
        """Load a page by its address."""
        self._ask("/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """Return what a function body of JavaScript returns in the page; what it promises is waited for."""
        return self._ask("/execute/sync", {"script": script, "args": list(arguments)})

    def press(self, *keys: str, shift: bool = False) -> None:
        """Press keys one after the other, of which each goes to what has the focus."""
        strokes = [{"type": kind, "value": key} for text in keys for key in text for kind in ("keyDown", "keyUp")]
        if shift:
            strokes = [{"type": "keyDown", "value": _SHIFT}, *strokes, {"type": "keyUp", "value": _SHIFT}]
        self._ask("/actions", {"actions": [{"type": "key", "id": "keys", "actions": strokes}]})

    def click(self, selector: str) -> None:
        """Click at an element as soon as it is there."""
        self.wait(f"document.querySelector({json.dumps(selector)})?.checkVisibility()")
        found = self._ask("/element", {"using": "css selector", "value": selector})
        self._ask(f"/element/{next(iter(found.values()))}/click")

    def text(self, selector: str) -> str:
        """Return the text of all elements of a selector that can be seen, in lines."""
        script = "return [...document.querySelectorAll(arguments[0])].filter((e) => e.checkVisibility())"
        return str(self.run(f"{script}.map((e) => e.innerText).join('\\n')", selector))

    def wait(self, condition: str) -> Any:
        """Wait until an expression of JavaScript is true, and return it."""
        deadline = time.monotonic() + _PATIENCE
        while not (found := self.run(f"return {condition}")):
            assert time.monotonic() < deadline, f"it did not come true: {condition}, but:\n{self.text('main')}"
            time.sleep(0.05)
        return found

    def resize(self, width: int, height: int) -> None:
        """Give the page a size in pixels of CSS."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def prefer(self, scheme: str) -> None:
        """Let the reader prefer a colour scheme: light or dark."""
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def command(self, name: str, **parameters: Any) -> Any:
        """Give a command of the DevTools protocol."""
        return self._ask("/goog/cdp/execute", {"cmd": name, "params": parameters})

    def picture(self) -> bytes:
        """Return what can be seen, as PNG."""
        return base64.b64decode(self._ask("/screenshot", method="GET"))

    def complaints(self) -> list[str]:
        """Return the errors of the page's console since the last time."""
        return [each["message"] for each in self._ask("/se/log", {"type": "browser"})]


@contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    """Have a browser while the block runs. folder: for its files."""
    assert DRIVER, MISSING
    with subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        line = next(line for line in driver.stdout if "successfully on port" in line)
        address = f"http://127.0.0.1:{line.rstrip().rstrip('.').rpartition(' ')[2]}/session"
        options = {"binary": PROGRAM, "args": [*_ARGUMENTS, f"--user-data-dir={folder}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "SEVERE"}}
        try:
            made = _asked(address, "POST", {"capabilities": {"alwaysMatch": wanted}})
            address = f"{address}/{made['sessionId']}"
            yield Browser(address)
            _asked(address, "DELETE", None)
        finally:
            driver.terminate()


def _asked(url: str, method: str, body: Any) -> Any:
    """Return the value that the driver answers. Raises AssertionError with what it says is wrong."""
    data = json.dumps(body).encode() if method == "POST" else None
    request = urllib.request.Request(url, data, {"content-type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(json.load(error)["value"]["message"]) from None
