import asyncio
import contextlib
import re
import threading
from urllib.parse import urlsplit

import numpy as np
import pytest
import soundfile

from tests.web.served import goodbyes
from tests.web_page.browser import CHROMIUM, Browser
from tests.web_page.served import served


class Loop:
    """An event loop in a thread of its own: the server answers while a test looks elsewhere."""

    def __init__(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(240)

    def close(self):
        self.run(goodbyes())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="package")
def loop():
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture(scope="package")
def browser(loop, tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install -y --no-install-recommends chromium")
    folder = tmp_path_factory.mktemp("browser")
    samples = 0.2 * np.random.default_rng(0).standard_normal(4 * 48_000)
    samples *= np.abs(np.sin(np.arange(len(samples)) / 12_000))  # syllables, of a sort
    soundfile.write(folder / "speech.wav", samples, 48_000, subtype="PCM_16")
    switches = [
        f"--use-file-for-fake-audio-capture={folder / 'speech.wav'}",
        "--host-resolver-rules=MAP talk.example 127.0.0.1",
    ]
    opened = contextlib.AsyncExitStack()
    yield loop.run(opened.enter_async_context(Browser.running(folder, *switches)))
    loop.run(opened.aclose())


@pytest.fixture(scope="package")
def serve(loop, tmp_path_factory):
    """Starts servers that end with the last test."""
    stack = contextlib.AsyncExitStack()

    def start(**options):
        folder = tmp_path_factory.mktemp("kept")
        return loop.run(stack.enter_async_context(served(folder, **options)))

    yield start
    loop.run(stack.aclose())


@pytest.fixture(scope="package")
def server(serve):
    return serve()


@pytest.fixture(scope="package")
def stock_server(serve):
    return serve(memory=False, rows=1)


@pytest.fixture(scope="package")
def closed_server(serve):
    return serve(token="a-token-of-24-characters", rows=1)


@pytest.fixture
def page(loop, browser):
    """A new tab; at its end it must have asked no other host, and complained about nothing else."""
    page = loop.run(browser.page())
    page.expected = [r"404 .*api/memories/"]  # how a browser says that nothing is kept yet
    yield page
    loop.run(page.close())
    hosts = {urlsplit(url).hostname for url in page.asked if url != "about:blank"}
    assert hosts <= {"127.0.0.1", "talk.example"}
    assert [c for c in page.complaints if not any(re.search(e, c) for e in page.expected)] == []
