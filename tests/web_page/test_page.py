"""The page in a headless Chromium: a talk is heard, read and seen, and its memory kept."""

import json
import re

from tests.web_page.browser import wait_for
from tests.web_page.steps import (
    FOCUSED,
    KNOWS_THE_MODEL,
    in_loop,
    name_given,
    shown,
    talk_begins,
    text,
)

COLOURED = """[...document.querySelectorAll('canvas')].map(c => {
    const copy = new OffscreenCanvas(c.width, c.height).getContext('2d');
    copy.drawImage(c, 0, 0);
    const { data } = copy.getImageData(0, 0, c.width, c.height);
    return data.filter((v, i) => i % 4 == 0 && Math.abs(v - data[i + 2]) > 30).length;
})"""  # pixels: axes and their numbers are grey
WATCHED = """window.loud = 0;
setInterval(() => {
    window.loud += Number(document.querySelector('#saidLevel').ariaValueNow) > -60;
}, 100)"""  # dB; silence is -60
KEEP_AND_TYPE = """{
    document.querySelector('#keepNow').click();
    const name = document.querySelector('#name');
    name.value = 'hansi';
    name.dispatchEvent(new Event('input'));
}"""  # before it is saved


def chat_of(page):
    """The address of the last talk."""
    return [url for url in page.asked if "/api/chat?" in url][-1]


@in_loop
async def test_a_talk_is_heard_read_and_seen_and_its_memory_kept(loop, page, server):
    await page.go(server.url)
    await page.until(KNOWS_THE_MODEL)
    await name_given(page, "Anna")
    await page.until(f"{text('#keptState')} == 'Nothing is kept under this name yet.'")
    await talk_begins(page)
    assert await page.js("document.querySelector('#device').options.length") >= 2
    assert await page.js("document.querySelector('#device').selectedOptions[0].label")
    before = await page.js(COLOURED)
    await page.js(WATCHED)
    await page.until("window.loud >= 10")
    await page.until(f"{text('#exchanged')}.split(' / ')[1] > 10")
    heard, answered = map(int, (await page.js(text("#exchanged"))).split(" / "))
    assert heard >= answered
    await page.until(f"/[a-z]/.test({text('#log')})")
    await page.until(f"{text('tbody tr:last-child td:nth-of-type(4)')} > 0")  # moved
    await page.until(f"{text('#ms')}.split(' / ').every(ms => ms > 0)")
    assert len(before) == 4  # written, inner loss, moved; milliseconds
    await page.until(f"({COLOURED}).every((now, i) => now > {json.dumps(before)}[i])")
    await page.click("#keepNow")
    await page.until(f"{text('#keptState')}.startsWith('Saved today')")
    await page.click("#toggle")
    assert await page.js(text("#toggle")) == "Start talking"
    await page.until(shown("#startKept"))

    await page.go(server.url)
    offered = await page.until(f"{shown('#start')} && {text('#startKeptText')}")
    assert re.search(r"learned from you: [1-9]\d* s of talk, saved today \d\d:\d\d", offered)
    await talk_begins(page)
    await page.until(f"/It starts with .* \\d+ s of talk/.test({text('#keptState')})")
    assert await page.js(f"{text('#name')} == '' && document.querySelector('#name').disabled")
    await page.click("#toggle")


@in_loop
async def test_a_talk_begun_without_a_name_can_be_kept_later(loop, page, server):
    server.put_memory("gina")
    await page.go(server.url)
    await talk_begins(page)
    await page.click("#keepNow")
    await page.until(f"{text('#keptState')}.startsWith('Give a name first')")
    assert await page.js(FOCUSED) == "name"
    await page.type("gina")  # who is somebody else, perhaps
    await page.click("#keepNow")
    await page.until(shown("#alarm"))
    assert "The memory could not be saved" in await page.js(text("#alarm"))
    await name_given(page, "hans")
    await page.js(KEEP_AND_TYPE)
    await page.until(f"{text('#keptState')}.startsWith('Saved today')")
    assert server.kept.find("hans").seconds > 0
    assert not await page.js(shown("#alarm"))
    assert await page.js("document.querySelector('#name').disabled")
    assert await page.js("document.querySelector('#name').value") == "hans"


@in_loop
async def test_what_is_kept_can_be_downloaded(loop, page, server, tmp_path):
    kept = server.put_memory("carl")
    await page.downloads_to(tmp_path)
    await page.go(server.url)
    await name_given(page, "carl")
    await page.until("!document.querySelector('#download').disabled")
    await page.click("#download")
    await wait_for((tmp_path / "carl.safetensors").is_file)
    assert (tmp_path / "carl.safetensors").read_bytes() == kept.read_bytes()


@in_loop
async def test_where_a_microphone_has_its_own_rate_the_server_resamples(loop, page, server):
    """As in Firefox: no microphone joins a context of another rate than its own."""
    await page.before_all(
        "const ask = AudioContext.prototype.createMediaStreamSource;"
        "AudioContext.prototype.createMediaStreamSource = function (stream) {"
        "    if (this.sampleRate === 24000) throw new DOMException('no', 'NotSupportedError');"
        "    return ask.call(this, stream);"
        "};"
    )
    await page.go(server.url)
    await talk_begins(page)
    rate = re.search(r"rate=(\d+)", chat_of(page))
    assert rate is not None
    assert int(rate[1]) in (44_100, 48_000)
    await page.until(f"{text('#saidText')}.endsWith('dB')")
    await page.until(f"{text('#exchanged')}.split(' / ')[1] > 20")  # answered


@in_loop
async def test_incognito_and_start_new(loop, page, server):
    server.put_memory("bert")
    await page.go(server.url)
    await name_given(page, "Bert")
    await page.until(shown("#startNew"))
    await page.click("#startNew")
    await page.click("#incognito")
    await talk_begins(page)
    asked = chat_of(page)
    assert "user=Bert" in asked
    assert "start=new" in asked
    assert "incognito=1" in asked
    assert await page.js("document.querySelector('#keepNow').disabled")
    assert "nothing of this talk is written down" in await page.js(text("#keptState"))


@in_loop
async def test_a_muted_microphone_gives_silence_and_the_talk_goes_on(loop, page, server):
    await page.go(server.url)
    await talk_begins(page)
    await page.until(f"{text('#heardText')}.endsWith('dB')")
    await page.until(f"parseInt({text('#exchanged')}) > 0")
    await page.click("#mute")
    await page.until(f"{text('#heardText')} == 'muted'")
    frames = int((await page.js(text("#exchanged"))).split(" / ")[0])
    await page.until(f"parseInt({text('#exchanged')}) > {frames + 10}")
    await page.until("document.querySelector('#heardLevel').firstElementChild.style.transform"
                     " == 'scaleX(0)'")  # fmt: skip
    await page.click("#mute")
    await page.until(f"{text('#heardText')}.endsWith('dB')")


MANY = """import('/page/memory.js').then(({ MemoryView }) => {
    const view = new MemoryView(document.querySelector('#memory'));
    const layers = Array.from({ length: 32 }, (_, i) => `transformer.layers.${i}`);
    view.show(layers);
    for (let t = 1; t < 30; t++) {
        const of = i => ({ update: i / t, loss_before: 3, loss_after: t, moved: t + i });
        view.add(t, Object.fromEntries(layers.map((name, i) => [name, of(i)])));
    }
    return [document.querySelectorAll('#memory tbody tr').length,
        document.querySelector('#memory tbody').lastElementChild.textContent,
        [...document.querySelectorAll('.plots .range')].map(e => e.textContent)];
})"""


@in_loop
async def test_many_layers_are_shown_as_strips(loop, page, server):
    await page.go(server.url)
    await page.until(KNOWS_THE_MODEL)
    rows, last, ranges = await page.js(MANY)
    assert rows == 32
    assert last.startswith("31" + "1.07" + "3" + "29" + "60")
    assert ranges == ["0 to 31", "1 to 60", "3 to 3", "1 to 29"]
    update, moved, before, after, _ = await page.js(COLOURED)
    assert min(update, moved, after) > 1000
    assert before > 0


THINNED = """import('/page/memory.js').then(({ History }) => {
    const history = new History();
    let most = 0;
    for (let t = 0; t < 3 * 3600; t++) {
        history.add({ t });
        most = Math.max(most, history.samples.length);
    }
    const times = history.samples.map(({ t }) => t);
    return [most, times[0], times.at(-1), times.slice(1).every((t, i) => t > times[i])];
})"""


@in_loop
async def test_half_an_hour_is_kept_and_thinned(loop, page, server):
    await page.go(server.url)
    most, first, last, ordered = await page.js(THINNED)
    assert most <= 721
    assert last == 3 * 3600 - 1
    assert last - 1800 <= first < last - 1500
    assert ordered
