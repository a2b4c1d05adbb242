"""NLL as its definition says, twice, and made of nothing that `eval.perplexity` is made of."""

import torch
import torch.nn.functional as F

from moshi_ttt.states import restore_ttt_states, save_ttt_states


@torch.no_grad()
def forward_nll(lm, codes):
    """[9, T] by one call of `LMModel.forward`, NaN outside its masks."""
    out = lm(codes[None])
    rows = []
    for k in range(9):
        logits = out.text_logits[0, 0] if k == 0 else out.logits[0, k - 1]
        mask = out.text_mask[0, 0] if k == 0 else out.mask[0, k - 1]
        row = torch.full(mask.shape, float("nan"), dtype=logits.dtype)
        row[mask] = F.cross_entropy(logits[mask], codes[k][mask], reduction="none")
        rows.append(row)
    return torch.stack(rows)


@torch.no_grad()
def streamed_nll(lm, codes, before=None):
    """[9, T] by moshi's own streaming, one frame a call.

    Args:
        lm: not streaming.
        codes: [17, T].
        before: called with t before frame t, inside the stream.
    """
    frames = codes.shape[1]
    inputs = torch.empty(1, 17, frames + 1, dtype=torch.long)
    for k, delay in enumerate(lm.delays):
        nothing_yet = lm.text_card if k == 0 else lm.card
        for t in range(frames + 1):
            inputs[0, k, t] = nothing_yet if t <= delay else codes[k, t - 1 - delay]
    nll = torch.full((9, frames), float("nan"), dtype=lm.dtype)
    with lm.streaming(1):
        for t in range(frames):
            if before is not None:
                before(t)
            hidden, text = lm.forward_text(inputs[:, :, t : t + 1])
            audio = lm.forward_depformer_training(inputs[:, :, t + 1 : t + 2], hidden)
            for k, delay in enumerate(lm.delays[:9]):
                target, at = inputs[0, k, t + 1], t - delay
                if at >= 0 and target >= 0:
                    logits = text[0, 0, 0] if k == 0 else audio[0, k - 1, 0]
                    nll[k, at] = -logits.log_softmax(-1)[target]
    return nll


def memories_at(lm, codes, every):
    """t -> what the memories are, in a stream of their own, before each multiple t of `every`."""
    found = {}

    def before(t):
        if t and t % every == 0:
            found[t] = save_ttt_states(lm)

    streamed_nll(lm, torch.cat([codes, codes[:, :1]], 1), before)  # before the frame after the last
    return found


def lent_nll(lm, codes, other, every):
    """[9, T] where the memories come from `other` at each multiple of `every`."""
    states = memories_at(lm, other, every)

    def before(t):
        if t and t % every == 0:
            restore_ttt_states(lm, states[t])

    return streamed_nll(lm, codes, before)


def assert_same(a, b, tolerance=1e-8):
    """Equal within `tolerance`, NaN where NaN."""
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance, equal_nan=True)
