"""The page in a headless Chromium: what can go wrong is said, with what to do."""

import re

from tests.web_page.steps import (
    FOCUSED,
    KNOWS_THE_MODEL,
    TALKS,
    in_loop,
    shown,
    talk_begins,
    text,
)


@in_loop
async def test_full_is_said(loop, page, server):
    others = [server.host.open() for _ in range(server.host.capacity - server.host.taken)]
    await page.go(server.url)
    await page.click("#toggle")
    await page.until(shown("#alarm"))
    assert re.fullmatch("All 2 conversations .*taken.*[.]", await page.js(text("#alarm")))
    assert await page.js("document.querySelector('#alarm').role") == "alert"
    assert await page.js(text("#toggle")) == "Start talking"
    for other in others:
        other.close()
    await page.click("#toggle")
    await page.until(TALKS)
    await page.click("#toggle")


@in_loop
async def test_a_lost_connection_is_said_and_one_press_joins_again(loop, page, server):
    async with server.behind_a_wire() as wire:
        await page.go(wire.url)
        await talk_begins(page)
        await page.until(f"/[a-z]/.test({text('#log')})")
        wire.cut()
        await page.until(shown("#alarm"))
        assert "connection to the server is lost" in await page.js(text("#alarm"))
        assert await page.js(text("#toggle")) == "Reconnect"
        await page.click("#toggle")
        await page.until(TALKS)
        assert not await page.js(shown("#alarm"))
        assert await page.js(text("#log"))  # what was said before is still there


@in_loop
async def test_a_refused_microphone_is_said_with_what_to_do(loop, page, server):
    await page.go(server.url)
    await page.refuse("microphone", server.url)
    await page.click("#toggle")
    await page.until(shown("#alarm"))
    assert "does not allow this page to use the microphone. Allow it" in (
        await page.js(text("#alarm"))
    )
    assert await page.js(text("#toggle")) == "Start talking"


@in_loop
async def test_sound_that_the_browser_has_paused_goes_on_with_a_press(loop, page, server):
    """As a phone does when it is called."""
    await page.before_all(
        "window.AudioContext = class extends AudioContext {"
        "    constructor(...options) { super(...options); window.context = this; }"
        "};"
    )
    await page.go(server.url)
    await talk_begins(page)
    await page.js("context.suspend()")
    await page.until(f"{text('#status')} == 'The browser has paused the sound.'")
    await page.click("#resume")
    await page.until(TALKS)
    assert not await page.js(shown("#resume"))


@in_loop
async def test_a_microphone_that_is_gone_is_said(loop, page, server):
    await page.before_all(
        "const ask = MediaDevices.prototype.getUserMedia;"
        "MediaDevices.prototype.getUserMedia = async function (wanted) {"
        "    return window.stream = await ask.call(this, wanted);"
        "};"
    )
    await page.go(server.url)
    await talk_begins(page)
    await page.js("stream.getAudioTracks()[0].dispatchEvent(new Event('ended'))")
    await page.until(shown("#alarm"))
    assert "The microphone is gone" in await page.js(text("#alarm"))
    assert await page.js(text("#toggle")) == "Start talking"


@in_loop
async def test_a_token_is_asked_for_or_taken_from_the_address(loop, page, closed_server):
    page.expected.append(r"401 .*api/model")
    await page.go(closed_server.url)
    await page.until(shown("#tokenForm"))
    assert await page.js(FOCUSED) == "token"
    for wrong in ("not-the-right-token", "\u00fc\u20ac"):
        await page.type(wrong)
        await page.press("Enter")
        await page.until(f"{text('#alarm')} == 'The token is wrong.'")
        await page.js("document.querySelector('#alarm').textContent = ''")
        await page.js("document.querySelector('#token').select()")
    await page.go(f"{closed_server.url}#token={closed_server.token}")
    await page.until(KNOWS_THE_MODEL)
    assert not await page.js(shown("#tokenForm"))
    assert closed_server.token not in await page.js("location.href")
    await talk_begins(page)
    await page.go(closed_server.url)  # the tab still knows it
    await page.until(KNOWS_THE_MODEL)


@in_loop
async def test_without_a_secure_connection_it_says_what_to_do(loop, page, closed_server):
    page.expected.append("Cross-Origin-Opener-Policy header has been ignored")  # as it is http
    url = closed_server.url.replace("127.0.0.1", "talk.example")
    await page.go(f"{url}#token={closed_server.token}")
    await page.until(KNOWS_THE_MODEL)
    assert await page.js(shown("#insecure"))
    assert await page.js("document.querySelector('#toggle').disabled")


@in_loop
async def test_a_model_without_memory_says_so(loop, page, stock_server):
    await page.go(stock_server.url)
    await page.until(shown("#keepNone"))
    assert "no memory" in await page.js(text("#keepNone"))
    assert await page.js(shown("#memory .none"))
    assert not await page.js(shown("#memory table"))
    await talk_begins(page)
    await page.until(f"{text('#ms')}.split(' / ').every(ms => ms > 0)")
