"""A headless Chromium, driven by its debugging protocol: enough to open a page, run code in it and take a picture."""

from __future__ import annotations

import asyncio
import base64
import itertools
import shutil
import subprocess
import time
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--hide-scrollbars",
    "--remote-debugging-port=0",
)  # fmt: skip


class Page:
    """A page in the browser, with what it requested and what it wrote to the console."""

    def __init__(self, socket):
        self._socket = socket
        self._ids = itertools.count()
        self._answers = {}
        self.requests = []
        self.errors = []
        self._reader = asyncio.create_task(self._read())

    async def _read(self):
        async for message in self._socket:
            event = message.json()
            if "id" in event:
                self._answers.pop(event["id"]).set_result(event)
            method, params = event.get("method"), event.get("params", {})
            if method == "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            elif method == "Runtime.exceptionThrown":
                self.errors.append(params["exceptionDetails"])
            elif (method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning")) or (
                method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert")
            ):
                self.errors.append(params)

    async def call(self, method, **params):
        number = next(self._ids)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        event = await asyncio.wait_for(answer, 60)
        assert "error" not in event, (method, event["error"])
        return event["result"]

    async def run(self, code):
        """Run an expression, wait for its promise and return its value."""
        result = await self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    async def open(self, path, width=1280, height=900, dark=False, until="document.documentElement?.dataset.ready"):
        """Open a file, and return the seconds until an expression is true."""
        await self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                        mobile=width < 600)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        started = time.perf_counter()
        await self.call("Page.navigate", url=Path(path).absolute().as_uri())
        await self.wait_for(until)
        return time.perf_counter() - started

    async def wait_for(self, condition, seconds=30):
        """Wait until an expression is true."""
        deadline = time.perf_counter() + seconds
        while not await self.run(f"Boolean({condition})"):
            assert time.perf_counter() < deadline, f"{condition} is not true after {seconds} s; {self.errors}"
            await asyncio.sleep(0.02)

    async def press(self, key):
        """Press a key where the focus is."""
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key=key)

    async def screenshot(self, path, whole=False):
        """Save a picture of the view, or of the whole page."""
        picture = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(picture["data"]))


@asynccontextmanager
async def open_browser(profile):
    """Start a browser with an empty profile in a folder, and yield its page."""
    process = subprocess.Popen(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port_file = Path(profile, "DevToolsActivePort")
        deadline = time.perf_counter() + 30
        while not (port_file.exists() and port_file.read_text().count("\n")):
            assert process.poll() is None, "The browser ended at once."
            assert time.perf_counter() < deadline, "The browser did not start within 30 s."
            await asyncio.sleep(0.05)
        port = port_file.read_text().split("\n")[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
                (target,) = [one for one in await response.json() if one["type"] == "page"]
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                for domain in ("Page", "Runtime", "Log", "Network"):
                    await page.call(f"{domain}.enable")
                yield page
    finally:
        process.terminate()
        process.wait(10)
