import os

import pytest
import torch
from jaxtyping import install_import_hook

os.environ.setdefault("NO_TORCH_COMPILE", "1")  # before moshi is imported
install_import_hook("moshi_ttt.ops", "beartype.beartype")


@pytest.fixture(autouse=True)
def _one_thread_one_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)
