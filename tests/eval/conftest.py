"""What the tests of this folder share."""

import pytest

from tests.eval.undrawn import leave_undrawn


@pytest.fixture
def undrawn(monkeypatch):
    """No picture is drawn: for tests of a command whose pictures another of its tests draws."""
    leave_undrawn(monkeypatch)
