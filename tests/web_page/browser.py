"""A headless Chromium with a fake microphone, driven over the Chrome DevTools Protocol."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SWITCHES = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--mute-audio",
    "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--use-fake-device-for-media-stream", "--remote-debugging-port=0",
    "--autoplay-policy=document-user-activation-required",
]  # fmt: skip


class Page:
    """One tab, with what it has asked for and complained about since it was opened.

    Attributes:
        asked: addresses of all its requests.
        complaints: messages of its console that are warnings or errors, and uncaught errors.
    """

    def __init__(self, browser: Browser, session: str, target: str, context: str) -> None:
        self._browser, self._session = browser, session
        self._target, self._context = target, context
        self.asked: list[str] = []
        self.complaints: list[str] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One call of the protocol."""
        return await self._browser.call(method, self._session, **params)

    def happened(self, method: str, params: dict[str, Any]) -> None:
        """Note an event."""
        if method == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        elif method == "Network.webSocketCreated":
            self.asked.append(params["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("warning", "error"):
            self.complaints.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("warning", "error"):
            self.complaints.append(json.dumps(params["entry"]))

    async def go(self, url: str) -> None:
        """Open an address, or the same one anew, and wait until it is there."""
        await self.call("Page.navigate", url="about:blank")
        await self.until("location.href == 'about:blank'")
        await self.call("Page.navigate", url=url)
        await self.until("location.href != 'about:blank' && document.readyState == 'complete'")

    async def js(self, expression: str) -> Any:
        """The value of an expression; a promise is awaited."""
        answer = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True,
            userGesture=False,
        )  # fmt: skip
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    async def until(self, expression: str, seconds: float = 30) -> Any:
        """Wait until an expression is true, and return what it is."""
        deadline = time.monotonic() + seconds
        while not (value := await self.js(expression)):
            if time.monotonic() > deadline:
                text = await self.js("document.body.innerText")
                raise AssertionError(f"after {seconds} s not so: {expression}\n{text}")
            await asyncio.sleep(0.05)
        return value

    async def click(self, selector: str) -> None:
        """A real click in the middle of an element."""
        x, y = await self.js(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect();"
            f" return [r.x + r.width / 2, r.y + r.height / 2]; }})"
            f"(document.querySelector({json.dumps(selector)}))"
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.call(
                "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1
            )

    async def press(self, key: str, *, shift: bool = False) -> None:
        """A key: Tab, Enter, Escape or Space."""
        code, text = {"Tab": (9, ""), "Enter": (13, "\r"), "Escape": (27, ""), "Space": (32, " ")}[
            key
        ]
        named = {
            "key": text if key == "Space" else key,
            "code": key,
            "windowsVirtualKeyCode": code,
            "modifiers": 8 if shift else 0,
        }
        await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **named)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    async def type(self, text: str) -> None:
        """Text into what has the focus."""
        await self.call("Input.insertText", text=text)

    async def refuse(self, permission: str, url: str) -> None:
        """Have the user refuse something to a site."""
        await self._browser.call(
            "Browser.setPermission", permission={"name": permission}, setting="denied",
            origin=url.rstrip("/"), browserContextId=self._context,
        )  # fmt: skip

    async def downloads_to(self, folder: Path) -> None:
        """Where the browser puts what is downloaded."""
        await self._browser.call(
            "Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder),
            browserContextId=self._context,
        )  # fmt: skip

    async def before_all(self, script: str) -> None:
        """Run a script in every page that is opened here, before its own."""
        guarded = f"if (location.protocol !== 'about:') {{ {script} }}"
        await self.call("Page.addScriptToEvaluateOnNewDocument", source=guarded)

    async def accessible(self) -> list[tuple[str, str]]:
        """Role and name of everything that a screen reader finds."""
        nodes = (await self.call("Accessibility.getFullAXTree"))["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"]
        ]

    async def close(self) -> None:
        """Close the tab and forget what it has stored."""
        await self._browser.call("Target.closeTarget", targetId=self._target)
        await self._browser.call("Target.disposeBrowserContext", browserContextId=self._context)

    async def size(self, width: int, height: int, *, phone: bool = False) -> None:
        """Of the viewport, in CSS pixels."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, mobile=phone,
            deviceScaleFactor=2 if phone else 1,
        )  # fmt: skip

    async def screenshot(self, file: Path, *, whole: bool = True) -> None:
        """A png of the page."""
        answer = await self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(answer["data"]))


class Browser:
    """The connection to a Chromium; `running` makes one."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._pages: dict[str, Page] = {}
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for message in self._socket:
            told = json.loads(message.data)
            if "id" in told:
                self._waiting.pop(told["id"]).set_result(told)
            elif told.get("sessionId") in self._pages:
                self._pages[told["sessionId"]].happened(told["method"], told["params"])

    async def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """One call of the protocol, of the browser or of a tab."""
        number = next(self._numbers)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": params}
        await self._socket.send_str(
            json.dumps(message | ({"sessionId": session} if session else {}))
        )
        told = await asyncio.wait_for(self._waiting[number], 60)
        assert "error" not in told, f"{method}: {told['error']}"
        return told["result"]

    async def page(self) -> Page:
        """A new tab, with a storage of its own, whose user allows the microphone."""
        context = (await self.call("Target.createBrowserContext"))["browserContextId"]
        await self.call(
            "Browser.grantPermissions", permissions=["audioCapture"], browserContextId=context
        )
        target = await self.call("Target.createTarget", url="about:blank", browserContextId=context)
        attached = await self.call(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )
        page = Page(self, attached["sessionId"], target["targetId"], context)
        self._pages[attached["sessionId"]] = page
        for room in ("Page", "Runtime", "Network", "Log", "Accessibility"):
            await page.call(f"{room}.enable")
        return page

    @classmethod
    @asynccontextmanager
    async def running(cls, folder: Path, *switches: str) -> AsyncIterator[Browser]:
        """A Chromium with its profile in a folder, ended at the end."""
        assert CHROMIUM is not None
        log = (folder / "chromium.log").open("wb")
        process = subprocess.Popen(
            [CHROMIUM, *SWITCHES, f"--user-data-dir={folder / 'profile'}", *switches],
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            found = folder / "profile/DevToolsActivePort"
            await wait_for(lambda: found.is_file() and len(found.read_text().split()) == 2)
            port, path = found.read_text().split()
            async with aiohttp.ClientSession() as http:
                url = f"ws://127.0.0.1:{port}{path}"
                async with http.ws_connect(url, max_msg_size=0) as socket:
                    browser = cls(socket)
                    yield browser
                    browser._reading.cancel()
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            log.close()


async def wait_for(happened: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.05)
