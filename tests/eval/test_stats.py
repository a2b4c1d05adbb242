import numpy as np
import pytest

from eval.stats import binned, bootstrap, curve, default_bin, estimate, range_mean

NAN = float("nan")


def test_interval_of_a_known_answer():
    # means of 100 draws of N(1, 2): the interval is mean +- 1.96 * std / sqrt(100)
    values = np.random.default_rng(3).normal(1.0, 2.0, 100)
    low, high = bootstrap(values[:, None], [f"s{i}" for i in range(100)])
    half = 1.96 * values.std() / 10
    assert low[0] == pytest.approx(values.mean() - half, abs=0.03)
    assert high[0] == pytest.approx(values.mean() + half, abs=0.03)


def test_recordings_of_one_speaker_are_drawn_together():
    # ten copies of each of four speakers tell no more than one of each
    values = np.array([0.0, 1.0, 2.0, 3.0])
    speakers = list("abcd")
    one = bootstrap(values[:, None], speakers)
    ten = bootstrap(np.repeat(values, 10)[:, None], [s for s in speakers for _ in range(10)])
    assert one == ten
    apart = bootstrap(np.repeat(values, 10)[:, None], [str(i) for i in range(40)])
    assert apart[1] - apart[0] < 0.5 * (one[1] - one[0])


def test_same_numbers_again_and_in_another_order():
    values = np.random.default_rng(0).normal(size=(7, 3))
    speakers = [f"s{i}" for i in range(7)]
    first = bootstrap(values, speakers)
    np.testing.assert_array_equal(first, bootstrap(values, speakers))
    order = [3, 0, 6, 5, 1, 2, 4]
    np.testing.assert_array_equal(first, bootstrap(values[order], [speakers[i] for i in order]))


def test_two_equal_and_opposite_speakers():
    # draws of two out of two: both a, both b, or one of each
    low, high = bootstrap(np.array([[-1.0], [1.0]]), ["a", "b"])
    assert (low[0], high[0]) == (-1.0, 1.0)


def test_nan_is_left_out_of_its_column_and_said():
    speakers = ["a", "b", "c"]
    found = estimate(np.array([1.0, NAN, 3.0]), speakers, "too short")
    assert (found.mean, found.n, found.reason) == (2.0, 2, "")
    assert (found.low, found.high) == (1.0, 3.0)
    none = estimate(np.full(3, NAN), speakers, "too short")
    assert np.isnan([none.mean, none.low, none.high]).all()
    assert (none.n, none.reason) == (0, "too short")
    single = estimate(np.array([1.0, 2.0]), ["a", "a"], "")
    assert single.mean == 1.5
    assert np.isnan(single.low)
    assert single.reason == "one speaker only: no interval"


def test_speakers_must_match():
    with pytest.raises(ValueError, match="3 recordings, but 2 speakers"):
        bootstrap(np.zeros((3, 1)), ["a", "b"])


def test_ranges():
    nll = np.arange(20.0)
    assert range_mean(nll, "0-1x", 4) == 1.5
    assert range_mean(nll, "1x-4x", 4) == np.arange(4, 16).mean()
    assert range_mean(nll, "4x-end", 4) == np.arange(16, 20).mean()
    assert range_mean(nll, "1x-end", 4) == np.arange(4, 20).mean()
    assert np.isnan(range_mean(nll, "1x-4x", 6))  # does not reach frame 24
    assert np.isnan(range_mean(nll, "4x-end", 5))  # ends there
    nll[5] = NAN
    assert range_mean(nll, "1x-2x", 4) == np.mean([4, 6, 7])


def test_curves_end_with_the_shortest():
    rows = binned([np.arange(10.0), np.arange(7.0)], 3)
    np.testing.assert_array_equal(rows, [[1, 4], [1, 4]])
    assert binned([np.arange(2.0)], 3).shape == (1, 0)
    assert curve(binned([np.arange(2.0)], 3), ["a"]) == {"mean": [], "low": [], "high": []}
    assert default_bin(3000) == 250
    assert default_bin(50) == 25
    assert default_bin(1) == 1


def test_what_goes_to_the_end_is_at_least_a_window():
    nll = np.arange(100.0)
    assert range_mean(nll[:50], "4x-end", 10) == 44.5
    assert np.isnan(range_mean(nll[:49], "4x-end", 10))
    assert range_mean(nll[:20], "1x-end", 10) == 14.5
    assert np.isnan(range_mean(nll[:60], "4x-end", 10, frames=80))  # not scored to its end
