"""The text row, token by token."""

import pytest

from finetune.data.interleaver import Interleaver
from finetune.data.transcript import MAIN_SPEAKER, Word

PAD, EPAD = 3, 0


@pytest.fixture
def interleaver(tokenizer):
    return Interleaver(tokenizer)


def word(text, start, end=None, speaker=MAIN_SPEAKER):
    return Word(text, start, start + 0.1 if end is None else end, speaker)


def tokens(interleaver, text):
    found = interleaver.tokenizer.encode(text)
    assert len(found) > 1, f"{text} should be of several tokens"
    return found


def test_a_word_begins_on_the_frame_of_its_start(interleaver):
    six, ten = tokens(interleaver, "seven"), tokens(interleaver, "three")
    row = interleaver.row([word("seven", 0.83), word(" three ", 3.2)], 60).tolist()
    wanted = [PAD] * 60
    wanted[10 : 10 + len(six)] = six  # 0.83 s lies in frame 10, of 0.80 to 0.88 s
    wanted[40 : 40 + len(ten)] = ten
    wanted[9] = wanted[39] = EPAD
    assert row == wanted


def test_the_row_is_as_long_as_the_recording(interleaver):
    for frames in (0, 1, 7, 13, 1000):
        assert interleaver.row([word("seven", 0.4)], frames).shape == (frames,)
        assert interleaver.row(None, frames).tolist() == [PAD] * frames


def test_a_word_at_the_very_start_and_at_the_end(interleaver):
    seven = tokens(interleaver, "seven")
    row = interleaver.row([word("seven", 0.0), word("seven", 2.33)], 30).tolist()
    assert row[: len(seven)] == seven
    assert row[28:] == [EPAD, seven[0]]
    late = interleaver.row([word("seven", 0.08 * 30 + 0.01)], 30).tolist()
    assert late == [PAD] * 30


def test_the_next_word_cuts_the_one_before(interleaver):
    seven, three = tokens(interleaver, "seven"), tokens(interleaver, "three")
    row = interleaver.row([word("seven", 0.8), word("three", 0.88)], 30).tolist()
    assert row[9 : 11 + len(three)] == [EPAD, seven[0], *three]
    same = interleaver.row([word("seven", 0.8), word("three", 0.81)], 30).tolist()
    assert same[9 : 10 + len(three)] == [EPAD, *three]


def test_words_that_follow_closely_have_no_padding_between(interleaver):
    seven, three = tokens(interleaver, "seven"), tokens(interleaver, "three")
    second = 10 + len(seven)
    row = interleaver.row([word("seven", 0.8), word("three", 0.08 * second + 0.001)], 40).tolist()
    assert row[9 : second + len(three)] == [EPAD, *seven, *three]


def test_only_the_main_speaker_and_only_words_with_duration(interleaver):
    row = interleaver.row(
        [word("seven", 0.8, speaker="SPEAKER_1"), word("three", 1.6, 1.6), word("", 1.7)], 30
    )
    assert row.tolist() == [PAD] * 30


def test_words_out_of_order_between_speakers(interleaver):
    words = [word("three", 0.8), word("seven", 0.2, speaker="SPEAKER_1"), word("ten", 2.0)]
    alone = [w for w in words if w.speaker == MAIN_SPEAKER]
    assert interleaver.row(words, 30).tolist() == interleaver.row(alone, 30).tolist()
