"""Options of the benchmarks that train: what is wrong is said before anything is."""

import pytest

from eval.bench import memories, passing
from moshi_ttt.errors import UserError


@pytest.mark.parametrize("bench", [memories, passing])
@pytest.mark.parametrize(
    ("typed", "match"),
    [
        (["--steps", "3"], "--steps"),
        (["--seeds", "many"], "--seeds"),
        (["--seeds", "0"], "at least 1"),
        (["--max-steps", "-1"], "at least 1"),
        (["--rounds", "0"], "at least 1"),
    ],
)
def test_a_wrong_option_is_one_line(bench, typed, match, tmp_path):
    with pytest.raises(UserError, match=match):
        bench.main([*typed, "--root", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()
