"""The page in a headless Chromium: keyboard, screen reader, light and dark, a phone."""

import re

import pytest

from tests.web_page.steps import (
    FOCUSED,
    KNOWS_THE_MODEL,
    TALKS,
    in_loop,
    name_given,
    shown,
    talk_begins,
    text,
)


async def tab_to(page, identity, *, back=False):
    for _ in range(20):
        await page.press("Tab", shift=back)
        if await page.js(FOCUSED) == identity:
            outline = "getComputedStyle(document.activeElement).outlineStyle"
            assert await page.js(outline) == "solid"
            return
    raise AssertionError(f"{identity} is not reached")


@in_loop
async def test_all_of_it_by_keyboard(loop, page, server):
    server.put_memory("dora")
    await page.go(server.url)
    await page.until(KNOWS_THE_MODEL)
    await tab_to(page, "name")
    await page.type("dora")
    await page.until(shown("#start"))
    await tab_to(page, "toggle", back=True)
    await page.press("Enter")
    await page.until(TALKS)
    assert await page.js(FOCUSED) == "toggle"
    await tab_to(page, "mute")
    await page.press("Space")
    assert await page.js("document.activeElement.ariaPressed") == "true"
    await tab_to(page, "toggle", back=True)
    await page.press("Space")
    await page.until("!document.querySelector('#remove').disabled")
    await tab_to(page, "remove")
    await page.press("Enter")
    await page.press("Escape")
    assert not await page.js("document.querySelector('dialog').open")
    assert await page.js(FOCUSED) == "remove"
    await page.press("Enter")
    await page.press("Tab")
    await page.press("Enter")
    await page.until(f"{text('#keptState')}.startsWith('Deleted.')")
    assert await page.js(FOCUSED) == "name"
    assert server.kept.find("dora") is None


CONTROLS = {"button", "textbox", "combobox", "checkbox", "radio", "meter", "image", "log", "region",
            "table", "dialog", "group", "form"}  # fmt: skip


@in_loop
async def test_a_screen_reader_finds_everything_named(loop, page, server):
    server.put_memory("emil")
    await page.go(server.url)
    await name_given(page, "emil")
    await page.until(shown("#start"))
    found = await page.accessible()
    nameless = [(role, name) for role, name in found if role in CONTROLS and not name]
    assert nameless == []
    assert {
        ("button", "Start talking"), ("button", "Mute"), ("button", "Keep memory now"),
        ("button", "Download"), ("button", "Delete"), ("button", "Copy"), ("textbox", "Your name"),
        ("combobox", "Microphone"), ("checkbox", "Cancel the echo"), ("meter", "You"),
        ("meter", "Moshi"), ("log", "What Moshi says"),
        ("checkbox", "Incognito: write nothing down"), ("heading", "Talk to Moshi"),
        ("heading", "The memory"), ("region", "Remember me"),
    } <= set(found)  # fmt: skip
    assert {"banner", "main", "status"} <= {role for role, _ in found}


CONTRAST = """(() => {
    const numbers = c => c.match(/[\\d.]+/g).map(Number);
    const light = c => numbers(c).slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = e => {
        const colour = getComputedStyle(e).backgroundColor;
        return numbers(colour)[3] === 0 ? ground(e.parentElement) : colour;
    };
    return [...document.querySelectorAll('body *')].filter(e => e.checkVisibility()
        && [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())
    ).map(e => {
        const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => x - y);
        return [(b + 0.05) / (a + 0.05), e.textContent.trim().slice(0, 40)];
    }).filter(([ratio]) => ratio < 4.5);
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@in_loop
async def test_light_or_dark_it_can_be_read(loop, page, server, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    await page.call("Emulation.setEmulatedMedia", features=features)
    await page.go(server.url)
    await page.until(KNOWS_THE_MODEL)
    await page.js("for (const e of document.querySelectorAll('.alarm')) e.hidden = false")
    dark = await page.js("getComputedStyle(document.documentElement).backgroundColor")
    assert (int(re.findall(r"\d+", dark)[0]) < 128) == (scheme == "dark")
    assert await page.js(CONTRAST) == []


SMALL = """[...document.querySelectorAll('button, select, input:not([type=checkbox], [type=radio]),'
    + 'label.check')].filter(e => e.checkVisibility() && e.offsetHeight < 44).map(e => e.id)"""


@in_loop
async def test_on_a_phone_nothing_goes_sideways_and_fingers_fit(loop, page, server):
    server.put_memory("fritz")
    await page.size(320, 640, phone=True)
    await page.go(server.url)
    await name_given(page, "fritz")
    await page.until(shown("#start"))
    await page.js("for (const e of document.querySelectorAll('.alarm')) e.hidden = false")
    await talk_begins(page)
    await page.until(f"parseInt({text('#exchanged')}) > 0")
    assert await page.js("[document.documentElement.scrollWidth, innerWidth]") == [320, 320]
    assert await page.js(SMALL) == []
