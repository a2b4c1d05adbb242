"""Initialisers that do nothing on the meta device, and everything elsewhere."""

import torch
from torch import nn

from moshi_ttt.unfilled import Unfilled
from tests.small import small_lm


def test_a_model_on_the_meta_device_has_the_parameters_that_it_would_have():
    want = small_lm()
    with torch.device("meta"), Unfilled():
        got = small_lm()
    assert got.state_dict().keys() == want.state_dict().keys()
    for (name, p), q in zip(got.named_parameters(), want.parameters(), strict=True):
        assert p.is_meta, name
        assert (p.shape, p.dtype, p.requires_grad) == (q.shape, q.dtype, q.requires_grad)


def test_what_holds_numbers_is_filled():
    torch.manual_seed(0)
    want = nn.init.trunc_normal_(nn.Linear(3, 4).weight)
    torch.manual_seed(0)
    with Unfilled():
        got = nn.init.trunc_normal_(nn.Linear(3, 4).weight)
    assert torch.equal(got, want)
