import os

os.environ.setdefault("NO_TORCH_COMPILE", "1")  # before moshi is imported

from jaxtyping import install_import_hook

install_import_hook("moshi_ttt.ops", "beartype.beartype")

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_one_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)
