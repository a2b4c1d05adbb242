"""A tiny model with nothing at its neutral value, and codes for it."""

import torch
from moshi.models.lm import LMModel

from moshi_ttt.config import TTTConfig
from moshi_ttt.hybrid import hybrid_layers, splice

CONTEXT = 8


def make_codes(frames, batch=1, seed=1, *, holes=True):
    gen = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 24, (batch, 17, frames), generator=gen)
    codes[:, 0] = torch.randint(0, 40, (batch, frames), generator=gen)
    if holes:
        codes[:, 3, 2] = -1
    return codes


def make_lm(memory="ttt_mlp", *, dtype=torch.float64, seed=0, **config):
    """A tiny Moshi in which nothing is at its neutral value; `memory=None` is a stock one."""
    torch.manual_seed(seed)
    lm = LMModel(
        delays=[0, 0] + [1] * 7 + [0] + [1] * 7,
        n_q=16,
        dep_q=8,
        card=24,
        text_card=40,
        dim=32,
        num_heads=2,
        num_layers=2,
        hidden_scale=2.0,
        norm="rms_norm",  # rms_norm_f32 rounds to float32, and may round a difference away
        causal=True,
        context=CONTEXT,
        max_period=10000,
        gating="silu",
        positional_embedding="rope",
        depformer_dim=16,
        depformer_num_heads=2,
        depformer_num_layers=1,
        depformer_dim_feedforward=32,
        depformer_multi_linear=True,
        depformer_weights_per_step=True,
        depformer_pos_emb="none",
        dtype=dtype,
    ).eval()
    if memory is not None:
        splice(lm, TTTConfig(memory=memory, layers="all", chunk_size=4, **config))
        for layer in hybrid_layers(lm):
            block = layer.seq_modeling_block
            if dtype == torch.float64:
                block.double()
            with torch.no_grad():
                block.gate.normal_()
                for name, parameter in block.memory.named_parameters():
                    if name in ("W1", "b1", "W2", "b2", "conv_weight", "conv_bias"):
                        parameter.normal_(std=0.5)
    return lm
