"""Debian's headless Chromium, controlled over the DevTools protocol by a websocket (aiohttp comes with MLflow)."""

from __future__ import annotations

import asyncio
import base64
import shutil
import subprocess
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import aiohttp

EXECUTABLE = shutil.which("chromium")
MISSING = "chromium is not installed; on Debian: apt-get install chromium"
PATIENCE_S = 300
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--no-first-run", "--disable-extensions", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--disable-default-apps", "--remote-debugging-port=0"),
    "--host-resolver-rules=MAP * ~NOTFOUND",  # no outside host can be reached
)


class Chromium:
    """A context manager for one browser with one page; `errors` and `requests` hold those of the page."""

    def __init__(self) -> None:
        assert EXECUTABLE, MISSING
        self._home = Path(tempfile.mkdtemp(prefix="adaptnet-chromium-"))
        words = [EXECUTABLE, *FLAGS, f"--user-data-dir={self._home}", "about:blank"]
        self._process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._loop = asyncio.new_event_loop()
        self._number = 0
        self._session: str | None = None
        self.errors: list[str] = []
        self.requests: list[str] = []

    def __enter__(self) -> Chromium:
        self._wait(self._connect())
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._wait(self._close())
        self._loop.close()
        shutil.rmtree(self._home, ignore_errors=True)

    def open(self, page: Path, width: int, height: int = 900, *, dark: bool = False, media: str = "") -> None:
        """Loads a file with a screen width and a theme."""
        phone = width < 600
        shape = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.ask("Emulation.setDeviceMetricsOverride", **shape)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media=media, features=[theme])
        self.errors.clear()
        self.requests.clear()
        self.ask("Page.navigate", url=page.absolute().as_uri())
        deadline = time.monotonic() + PATIENCE_S
        while self.run("document.readyState") != "complete" or not self.run("location.href").startswith("file:"):
            assert time.monotonic() < deadline, "the page does not load"

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        done = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def middle(self, selector: str) -> tuple[float, float]:
        """Scrolls to an element; returns the position of its centre on the screen."""
        script = (
            "(() => { const e = document.querySelector(%r); e.scrollIntoView({block: 'center', inline: 'center'}); "
            "const b = e.getBoundingClientRect(); return [b.left + b.width / 2, b.top + b.height / 2]; })()"
        )
        x, y = self.run(script % selector)
        return x, y

    def hover(self, selector: str) -> None:
        x, y = self.middle(selector)
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        x, y = self.middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def tap(self, selector: str) -> None:
        x, y = self.middle(selector)
        self.ask("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.ask("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, key: str) -> None:
        text = {"Enter": "\r", " ": " "}.get(key)
        about = {"key": key, "code": "Space" if key == " " else key} | ({"text": text} if text else {})
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, **about)

    def screenshot(self, *, whole: bool = False) -> bytes:
        """A PNG of the screen, or of the whole page."""
        found = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))
        return base64.b64decode(found["data"])

    def _clip(self, whole: bool) -> dict[str, Any]:
        if not whole:
            return {}
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def pdf(self) -> bytes:
        return base64.b64decode(self.ask("Page.printToPDF", printBackground=False)["data"])

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command of the protocol and returns its answer; records events that arrive before it."""
        found: dict[str, Any] = self._wait(self._ask(method, parameters))
        return found

    def _wait(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(asyncio.wait_for(work, PATIENCE_S))

    async def _connect(self) -> None:
        port = self._home / "DevToolsActivePort"
        while not port.exists() or len(port.read_text().splitlines()) < 2:
            assert self._process.poll() is None, "chromium ended at its start"
            await asyncio.sleep(0.05)
        number, path = port.read_text().splitlines()
        self._http = aiohttp.ClientSession()
        self._socket = await self._http.ws_connect(f"ws://127.0.0.1:{number}{path}", max_msg_size=0)

    async def _close(self) -> None:
        await self._socket.close()
        await self._http.close()

    async def _ask(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters, **session})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self._note(message.get("method"), message.get("params", {}))

    def _note(self, event: str | None, about: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.errors.append(str(about["exceptionDetails"]))
        elif event == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.errors.append(about["entry"]["text"])
        elif event == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.errors.append(str(about["args"]))
