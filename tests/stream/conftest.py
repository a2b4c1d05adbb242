import types

import pytest

from moshi_ttt.base import find_base
from moshi_ttt.checkpoint import save_checkpoint
from tests.small import small_base
from tests.stream.streams import hybrid


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    """A base and a checkpoint with a memory on disk."""
    folder = tmp_path_factory.mktemp("talking")
    base = find_base(small_base(folder / "base"))
    lm = hybrid()
    out = save_checkpoint(lm, folder / "runs/a/checkpoints/checkpoint_000001", base)
    return types.SimpleNamespace(root=folder, base=folder / "base", checkpoint=str(out))
