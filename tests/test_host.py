"""Many conversations in one engine: each as if alone; overload, leaving and failure at any time."""

import threading
import time

import numpy as np
import pytest
import torch

from moshi_ttt.engine import Engine, Sampling
from moshi_ttt.errors import UserError
from moshi_ttt.host import HEARD_FRAMES, SAID_FRAMES, Full, Host
from moshi_ttt.saved_memory import take_memory
from moshi_ttt.states import ttt_blocks
from tests.small import small_hybrid, small_lm, small_mimi, small_tokenizer

CARD = small_tokenizer().vocab_size()
FRAME = 1920


def hybrid(**config):
    return small_hybrid(lm={"text_card": CARD}, **config)


def engine_for(lm=None, rows=3, **options):
    options = {"sampling": Sampling(greedy=True)} | options
    return Engine(lm or hybrid(), small_mimi(), small_tokenizer(), rows=rows, **options)


def noise(frames, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal((frames, FRAME)).astype(np.float32)


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)


def answer(conversation):
    until(lambda: conversation._said.held)
    return conversation.said()


def talk(conversation, frames):
    """One frame after the answer to the one before: voice [T, 1920] and text."""
    out = []
    for frame in frames:
        conversation.hear(frame)
        out.append(answer(conversation))
    return np.stack([pcm for pcm, _ in out]), "".join(text for _, text in out)


def alone(frames, rows=3):
    with engine_for(rows=rows) as engine:
        pcm = np.zeros((rows, FRAME), np.float32)
        out, text = [], ""
        for frame in frames:
            pcm[0] = frame
            said = engine.step(pcm, np.arange(rows) == 0)
            out.append(said.pcm[0].numpy().copy())
            text += said.text[0]
    return np.stack(out), text


@pytest.fixture
def host():
    with engine_for() as engine, Host(engine) as running:
        yield running


def test_a_conversation_is_what_the_engine_says(host):
    frames = noise(15)
    wanted, text = alone(frames)
    heard = []
    conversation = host.open(notify=lambda: heard.append(threading.current_thread().name))
    got, said = talk(conversation, frames)
    assert np.array_equal(got, wanted)
    assert said == text
    assert wanted.std() > 1e-3
    assert set(heard) == {"engine"}
    assert (conversation.frames, host.taken, host.waiting) == (15, 1, 0)


def test_others_come_and_go_and_are_not_noticed(host):
    """Two others talk, pause, restart and leave at random in threads of their own."""
    frames, stop, seen = noise(80), threading.Event(), []

    def visitor(seed):
        rng = np.random.default_rng(seed)
        while not stop.is_set():
            other = host.open()
            for frame in noise(int(rng.integers(3, 20)), seed):
                other.hear(frame)
                if rng.random() < 0.1:
                    other.restart()
                if rng.random() < 0.2:
                    other.paused = not other.paused
                time.sleep(float(rng.random()) * 0.03)
            other.take_memory().result(10)
            other.close()
            seen.append(other.frames)

    wanted, _ = alone(frames)
    conversation = host.open()
    threads = [threading.Thread(target=visitor, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    got, _ = talk(conversation, frames)
    stop.set()
    for thread in threads:
        thread.join()
    assert np.array_equal(got, wanted)
    assert len(seen) > 4
    assert sum(seen) > 10
    assert host.taken == 1


def test_when_all_rows_are_taken_it_says_so_and_a_row_left_is_free_at_once(host):
    conversations = [host.open() for _ in range(3)]
    assert sorted(c.row for c in conversations) == [0, 1, 2]
    with pytest.raises(Full, match="all 3 conversations of 3 taken"):
        host.open()
    conversations[1].close()
    again = host.open()
    assert again.row == 1
    assert conversations[1].over == "it was closed"
    conversations[1].close()  # a second time does not touch the new one
    assert again.over is None
    wanted, _ = alone(noise(4))
    assert np.allclose(talk(again, noise(4))[0], wanted, 1e-3, 1e-6)


def test_rows_out_of_step_are_answered_in_common_steps(host, monkeypatch):
    monkeypatch.setattr(host.engine.times, "recent", lambda: 20.0)  # whatever the machine does
    one, two = host.open(), host.open()
    pcm, before = noise(30), 0
    for t, frame in enumerate(pcm):
        if t == 5:
            before = host.engine.times.count
        one.hear(frame)
        time.sleep(0.01)
        two.hear(frame)
        answer(one), answer(two)
    assert (one.frames, two.frames) == (30, 30)
    assert host.engine.times.count - before < 25 * 1.5


def test_whoever_asks_for_much_holds_nobody_up(host):
    """Something is always asked for; frames come in between."""
    conversation, stop = host.open(), threading.Event()

    def ask_again():
        if not stop.is_set():
            host._do(ask_again)

    ask_again()
    try:
        talk(conversation, noise(3))
    finally:
        stop.set()


def test_a_row_that_has_stopped_sending_holds_nobody_up(host, monkeypatch):
    monkeypatch.setattr(host.engine.times, "recent", lambda: 0.0)  # there would be time to wait
    one, two = host.open(), host.open()
    talk(two, noise(1))
    time.sleep(0.2)
    began, steps = time.monotonic(), host.engine.times.total_ms
    talk(one, noise(60))
    waited = time.monotonic() - began - (host.engine.times.total_ms - steps) / 1000
    assert waited < 60 * 0.08 / 2


def test_what_comes_too_fast_loses_its_oldest_frames_and_says_how_many():
    with engine_for() as engine:
        host = Host(engine)  # not started yet: nothing is taken
        conversation = host.open()
        for frame in noise(HEARD_FRAMES + 5):
            conversation.hear(frame)
        assert conversation.dropped_heard == host.dropped_heard == 5
        assert host.waiting == HEARD_FRAMES
        with host:
            until(lambda: conversation.frames == HEARD_FRAMES)
            got = np.stack([conversation.said()[0] for _ in range(HEARD_FRAMES)])
            assert conversation.said() is None
            assert np.array_equal(got, alone(noise(HEARD_FRAMES + 5)[5:])[0])
            conversation.close()
            assert host.dropped_heard == 5


def test_what_nobody_takes_is_dropped_and_its_text_kept(host):
    conversation, frames = host.open(), noise(SAID_FRAMES + 6)
    for t, frame in enumerate(frames):
        conversation.hear(frame)
        until(lambda n=t + 1: conversation.frames == n)
    assert conversation.dropped_said == 6
    wanted, text = alone(frames)
    out = [conversation.said() for _ in range(SAID_FRAMES)]
    assert np.array_equal(np.stack([pcm for pcm, _ in out]), wanted[6:])
    assert "".join(t for _, t in out) == text
    assert text.strip()


def test_a_pause_is_no_time_at_all(host):
    conversation, frames = host.open(), noise(12)
    wanted, _ = alone(frames)
    first, _ = talk(conversation, frames[:6])
    conversation.paused = True
    for frame in noise(5, seed=3):
        conversation.hear(frame)
    time.sleep(0.1)
    assert conversation.said() is None
    conversation.paused = False
    rest, _ = talk(conversation, frames[6:])
    assert np.array_equal(np.concatenate([first, rest]), wanted)
    assert conversation.dropped_heard == 0


def test_a_pause_that_begins_while_a_frame_comes_leaves_no_frame(host, monkeypatch):
    """One left in the queue of a paused row would keep the thread running for nothing."""
    conversation, pauses = host.open(), []
    put = conversation._heard.put

    def paused_meanwhile(frame):
        pauses.append(threading.Thread(target=setattr, args=(conversation, "paused", True)))
        pauses[0].start()
        pauses[0].join(0.05)
        put(frame)

    monkeypatch.setattr(conversation._heard, "put", paused_meanwhile)
    conversation.hear(noise(1)[0])
    pauses[0].join()
    assert conversation.paused
    assert host.waiting == 0


def test_a_frame_is_taken_for_the_conversation_that_it_was_said_to(host, monkeypatch):
    """A restart does not come between the look at a row and the taking of its frame."""
    conversation, waited = host.open(), []
    talk(conversation, noise(1))
    get = conversation._heard.get

    def restarted_meanwhile(out):
        thread = threading.Thread(target=conversation.restart)
        thread.start()
        thread.join(0.05)
        waited.append(thread.is_alive())
        return get(out)

    monkeypatch.setattr(conversation._heard, "get", restarted_meanwhile)
    conversation.hear(noise(1)[0])
    answer(conversation)
    assert waited[0]


def test_a_restart_is_a_new_conversation(host):
    conversation, frames = host.open(), noise(5)
    first, _ = talk(conversation, frames)
    conversation.restart()
    second, _ = talk(conversation, frames)
    assert np.array_equal(first, second)


def test_a_memory_taken_at_the_end_starts_the_next_conversation(host):
    conversation = host.open()
    talk(conversation, noise(20))
    future = conversation.take_memory()
    conversation.close()
    memory = future.result(10)
    assert memory.frames == 21
    again = host.open(memory=memory)
    assert again.take_memory().result(10).frames in (21, 22)  # before or after position 0
    with_it, _ = talk(again, noise(8, seed=2))
    fresh = host.open()
    without, _ = talk(fresh, noise(8, seed=2))
    assert not np.allclose(with_it, without, 1e-2, 1e-4)


def test_who_has_left_is_not_given_the_memory_of_who_came_after(host):
    conversation = host.open()
    talk(conversation, noise(2))
    conversation.close()
    again = host.open()
    assert again.row == conversation.row
    with pytest.raises(UserError, match="it was closed"):
        conversation.take_memory().result(10)
    assert again.take_memory().result(10).frames < 2


def test_a_memory_of_another_model_is_refused_and_takes_no_row(host):
    with engine_for(hybrid(chunk_size=5)) as other:
        memory = take_memory(other)
    with pytest.raises(UserError, match="chunk_size 5, not 4"):
        host.open(memory=memory)
    assert host.taken == 0


def test_without_a_memory_there_is_none_to_take():
    with engine_for(small_lm(text_card=CARD).eval()) as engine, Host(engine) as host:
        conversation = host.open()
        with pytest.raises(UserError, match="has no memory"):
            conversation.take_memory().result(10)
        assert host.failed is None
        talk(conversation, noise(2))


def test_readings_of_each_row_come_to_it():
    with engine_for(watch_every=5) as engine, Host(engine) as host:
        one, two = host.open(), host.open()
        talk(one, noise(20))
        assert one.reading is not None
        assert two.reading is None
        assert list(one.reading.layers) == ["transformer.layers.0", "transformer.layers.1"]


def test_a_memory_that_diverges_is_the_conversations_own_affair(host):
    one, two = host.open(), host.open()
    talk(one, noise(6)), talk(two, noise(6))
    bad = next(iter(ttt_blocks(host.engine.lm).values()))._streaming_state.memory
    host._do(lambda: bad.fast[0][two.row].fill_(torch.nan)).result(10)
    talk(one, noise(3)), talk(two, noise(3))
    assert (one.diverged, two.diverged) == (0, 1)


def test_an_engine_that_fails_ends_everything_and_says_so(host):
    told = threading.Event()
    host._on_failure = told.set
    conversation = host.open()
    talk(conversation, noise(2))

    asked = []

    def broken(*_):
        asked.extend(conversation.take_memory() for _ in range(2))
        asked[0].cancel()
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    host.engine.gen.on_text_logits_hook = broken
    conversation.hear(noise(1)[0])
    assert told.wait(10)
    assert host.failed == conversation.over == "the engine has failed: RuntimeError"
    assert "illegal memory access" in str(host.error)
    assert asked[0].cancelled()
    with pytest.raises(UserError, match="the engine has failed"):
        asked[1].result(1)
    with pytest.raises(UserError, match="the engine has failed"):
        host.open()
    with pytest.raises(UserError, match="the engine has failed"):
        conversation.take_memory().result(1)
    conversation.hear(noise(1)[0])


def test_when_the_host_stops_conversations_are_over_and_what_was_asked_is_done():
    with engine_for() as engine:
        with Host(engine) as host:
            conversation = host.open()
            talk(conversation, noise(3))
            future = conversation.take_memory()
        assert future.result(0).frames == 4
        assert conversation.over == "the server has stopped"
        assert not host._thread.is_alive()
        with pytest.raises(UserError, match="stopping"):
            host.open()
