import pytest

from moshi_ttt.kept import Kept


@pytest.fixture
def kept(tmp_path):
    return Kept(tmp_path / "new" / "kept")
