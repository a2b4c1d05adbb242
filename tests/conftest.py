import os

import pytest
import torch
from jaxtyping import config, install_import_hook

os.environ.setdefault("NO_TORCH_COMPILE", "1")  # before moshi is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a network
install_import_hook("moshi_ttt.ops", "beartype.beartype")


@pytest.fixture(autouse=True)
def _shapes(request):
    """Checked at every call in the tests of the ops; elsewhere that is a third of the time."""
    config.update("jaxtyping_disable", "ops" not in request.path.parts)


@pytest.fixture(autouse=True)
def _one_thread_one_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)
