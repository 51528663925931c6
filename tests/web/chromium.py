"""Headless Chromium, driven over its debugging pipe: the browser itself is all that has to be installed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from queue import Empty, Queue
from typing import Any

# Without these, Chromium looks for Google's hosts at every start, which a closed network refuses slowly.
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--mute-audio",
    "--remote-debugging-pipe",
]  # fmt: skip


def program() -> str | None:
    """Where Chromium is; ``None`` if it is not installed."""
    named = os.environ.get("STREAMWORKER_TEST_CHROMIUM")
    return named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class _Nothing(BaseHTTPRequestHandler):
    """An empty page."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Not on standard error."""


class Chromium:
    """One browser with one page."""

    def __init__(self) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="streamworker-chromium-"))
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # Chromium reads file 3 and writes file 4.
        script = f'exec "$@" 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "chromium", str(program()), *FLAGS, f"--user-data-dir={self._home}", "about:blank"],
            pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self._number = 0
        self._answers: dict[int, Queue[Any]] = {}
        self.complaints: list[str] = []
        self.requests: list[str] = []
        """Addresses that pages asked for."""
        threading.Thread(target=self._listen, daemon=True).start()
        self._nothing = HTTPServer(("127.0.0.1", 0), _Nothing)
        threading.Thread(target=self._nothing.serve_forever, daemon=True).start()
        self._session = ""
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        self._nothing.shutdown()
        self._nothing.server_close()
        shutil.rmtree(self._home, ignore_errors=True)

    def _listen(self) -> None:
        buffer = b""
        while True:
            try:
                chunk = os.read(self._read, 1 << 16)
            except OSError:
                return
            if not chunk:
                return
            *messages, buffer = (buffer + chunk).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    self._answers[message["id"]].put(message)
                elif message["method"] in ("Runtime.exceptionThrown", "Log.entryAdded"):
                    self.complaints.append(json.dumps(message["params"])[:500])
                elif message["method"] == "Network.requestWillBeSent":
                    self.requests.append(message["params"]["request"]["url"])

    def _ask(self, method: str, **params: Any) -> Any:
        self._number += 1
        queue = self._answers[self._number] = Queue()
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        try:
            answer = queue.get(timeout=30)
        except Empty:
            raise TimeoutError(f"{method}: Chromium does not answer") from None
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    # -- what a person does

    def size(self, width: int, height: int, *, dark: bool = False) -> None:
        self._ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        # Else the dot that beats is painted sixty times a second.
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme, still])

    def looks(
        self, *widths: int, height: int = 900, tones: Sequence[str] = ("light", "dark")
    ) -> Iterator[tuple[int, str]]:
        """See the open page in each width and tone, once it is laid out for that: (width, tone)."""
        for width in widths:
            for tone in tones:
                self.size(width, height, dark=tone == "dark")
                self.value(
                    "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"
                )
                yield width, tone

    def headers(self, **headers: str) -> None:
        self._ask("Network.setExtraHTTPHeaders", headers=headers)

    def open(self, url: str, ready: str = "typeof htmx === 'object'") -> None:
        """Go to a page, until it is complete and a script of it is ``ready``."""
        while True:
            self._ask("Page.navigate", url=url)
            self.until("document.readyState === 'complete'")
            # Chromium drops its connections, those to this machine too, when an interface comes or goes.
            torn = [said for said in self.complaints if "ERR_NETWORK_CHANGED" in said]
            if not torn:
                break
            self.complaints = [said for said in self.complaints if said not in torn]
        self.until(f"document.readyState === 'complete' && ({ready})")

    def leave(self) -> None:
        """Go where nothing is: a page that stays would call for its server after that has ended.

        Not to about:blank: this is the site of those pages (a port makes no other one), whose process is kept for the
        next of them.
        """
        self._ask("Page.navigate", url=f"http://127.0.0.1:{self._nothing.server_port}/")

    def value(self, script: str) -> Any:
        answer = self._ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def until(self, script: str, timeout: float = 30) -> Any:
        """Wait until a script is true, and return what it gave."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                found = self.value(script)
            except RuntimeError as error:  # in the middle of going elsewhere
                found, trouble = None, error
            else:
                trouble = None
            if found:
                return found
            assert time.monotonic() < deadline, (
                f"{script} did not come true: {trouble or self.value('document.body.innerText')[:3000]}"
            )
            time.sleep(0.05)

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of it; once more if the page moved it away meanwhile, as it does when it is live."""
        deadline = time.monotonic() + 30
        while not self._hit(json.dumps(selector)):
            assert time.monotonic() < deadline, f"{selector} gets no click"

    def _hit(self, quoted: str) -> bool:
        self.until(f"(e => e && !e.disabled && e.getClientRects().length)(document.querySelector({quoted}))")
        place = self.value(
            "(e => { if (!e) return null; e.scrollIntoView({block: 'center'}); window.clicked = false;"
            # By the selector: a live page may have put another element there, which has got the click.
            f" addEventListener('click', (event) => {{ window.clicked = !!event.target.closest({quoted}); }},"
            " {capture: true, once: true});"
            f" const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; }})(document.querySelector({quoted}))"
        )
        if place is None:
            return False
        for kind in ("mousePressed", "mouseReleased"):
            self._ask("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)
        try:
            return self.value("window.clicked ?? true") is True  # nothing is known of it on the page where it led
        except RuntimeError:  # in the middle of going there
            return True

    def press(self, *keys: str) -> None:
        for key in keys:
            text = "\r" if key == "Enter" else key if len(key) == 1 else ""
            self._ask("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, code=key)
            self._ask("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)

    def type(self, text: str) -> None:
        self._ask("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("Page.captureScreenshot", format="png")["data"]))
