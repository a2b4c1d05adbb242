"""A whole memory layer: slow weights, short convolution, learning rates, states of several rows."""

from itertools import pairwise

import pytest
import torch

from moshi_ttt.config import TTTConfig
from moshi_ttt.memory import MEMORIES, MemoryState, build_memory

every_memory = pytest.mark.parametrize("family", list(MEMORIES))
every_ttt = pytest.mark.parametrize("family", ["ttt_linear", "ttt_mlp"])
OPTIONS = {
    "ttt_linear": {"decay": 0.1},
    "ttt_mlp": {"decay": 0.1, "hidden_mult": 2},
    "lact": {"conv_width": 4, "low_rank": 3, "hidden_mult": 2},
    "atlas": {"decay": 0.1, "hidden_mult": 2, "window": 3},
}


def make(family, dtype=torch.float64, width=12, heads=2, **config):
    """A memory with nothing at its start value."""
    config = {"chunk_size": 6, **OPTIONS.get(family, {}), **config}
    memory = build_memory(width, heads, TTTConfig(memory=family, **config)).double()
    with torch.no_grad():
        for name, p in memory.named_parameters():
            if name in ("W1", "W2") and family != "atlas":
                p.mul_(15)
            elif name in ("decay_logit", "log_eta") or (p.dim() <= 2 and "proj" not in name):
                p.add_(0.2 * torch.randn_like(p))
    return memory.to(dtype)


def weights(memory, state):
    """One tensor of all fast weights and one of where they started, row by row."""
    pairs = list(memory.fast_weights(state.fast))
    rows = len(state.conv)
    now = torch.cat([w.reshape(rows, -1) for w, _ in pairs], 1)
    return now, torch.cat([w0.detach().reshape(-1) for _, w0 in pairs])


def clone(state):
    tensors = [x.detach().clone() for x in (*state.fast, state.conv)]
    return MemoryState(type(state.fast)._make(tensors[:-1]), tensors[-1])


def tensors(state):
    return (*state.fast, state.conv)


def stream(memory, x, state, exec_mask=None):
    masks = [None] * x.shape[1] if exec_mask is None else exec_mask.unbind(1)
    outs = [memory.step(x[:, t : t + 1], state, masks[t]) for t in range(x.shape[1])]
    return torch.cat(outs, 1)


def assert_near(a, b, tolerance=1e-13):
    assert a.shape == b.shape
    if b.numel():
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)


def every_setting():
    """Families, each also with the options that take another way through a memory."""
    plain = [(family, {}) for family in MEMORIES]
    narrow = [(family, {"conv_width": 1}) for family in MEMORIES]
    wide = [(family, {"head_dim": 4}) for family in MEMORIES]
    late = [(family, {"write_every": 2}) for family in ("ttt_linear", "ttt_mlp")]
    return pytest.mark.parametrize(("family", "config"), plain + narrow + wide + late, ids=str)


@every_setting()
@pytest.mark.parametrize("B", [1, 3])
def test_forward_in_pieces_and_step_are_one_function(family, config, B):
    memory, T = make(family, **config), 40
    x = torch.randn(B, T, 12, dtype=torch.float64)
    whole, end = memory(x, memory.init_state(B))
    state = clone(memory.init_state(B))
    assert_near(stream(memory, x, state), whole)
    for a, b in zip(tensors(state), tensors(end), strict=True):
        assert_near(a, b)
    for _ in range(4):
        cuts = [0, *torch.randint(0, T + 1, (5,)).sort().values.tolist(), T]
        state, outs = memory.init_state(B), []
        for begin, stop in pairwise(cuts):
            y, state = memory(x[:, begin:stop], state)
            outs.append(y)
        assert_near(torch.cat(outs, 1), whole)
        for a, b in zip(tensors(state), tensors(end), strict=True):
            assert_near(a, b)


@every_memory
def test_a_stream_never_writes_a_parameter(family):
    memory = make(family)
    before = {n: p.detach().clone() for n, p in memory.named_parameters()}
    with torch.no_grad():  # B = 1: an expanded W0 is already contiguous
        state = memory.init_state(1)
    stream(memory, torch.randn(1, 20, 12, dtype=torch.float64), state)
    assert not torch.equal(*weights(memory, state))
    for n, p in memory.named_parameters():
        assert torch.equal(p, before[n]), n


@every_setting()
def test_lengths_and_exec_mask_leave_rows_where_they_are(family, config):
    memory, B, T = make(family, **config), 3, 17
    x = torch.randn(B, T, 12, dtype=torch.float64)
    _, start = memory(x[:, :11], memory.init_state(B), torch.tensor([8, 3, 11]))  # 11: one left
    start = clone(start)
    lengths = torch.tensor([T, 5, 0])
    y, end = memory(x, start, lengths)
    streamed, mask = clone(start), torch.arange(T) < lengths[:, None]
    outs = stream(memory, x, streamed, mask)
    assert_near(outs[mask], y[mask])
    assert not y[~mask].any()
    for a, b, c in zip(tensors(streamed), tensors(end), tensors(start), strict=True):
        assert_near(a, b)
        assert torch.equal(a[2], c[2])
        assert torch.equal(b[2], c[2])
    for b, n in enumerate(lengths.tolist()):
        row = MemoryState(
            type(start.fast)._make(t[b : b + 1] for t in start.fast), start.conv[b:][:1]
        )
        alone, _ = memory(x[b : b + 1, :n], row)
        assert_near(alone[0], y[b, :n])


@every_memory
def test_reset_rows_are_fresh_and_the_others_untouched(family):
    memory, B = make(family), 3
    x = torch.randn(B, 15, 12, dtype=torch.float64)
    state = clone(memory.init_state(B))
    fresh = clone(state)
    stream(memory, x, state)
    moved, places = clone(state), [t.data_ptr() for t in tensors(state)]
    memory.reset_state(state, torch.tensor([False, True, False]))
    assert [t.data_ptr() for t in tensors(state)] == places
    assert not torch.equal(weights(memory, moved)[0][1], weights(memory, fresh)[0][1])
    for a, b, c in zip(tensors(state), tensors(fresh), tensors(moved), strict=True):
        assert torch.equal(a[1], b[1])
        assert torch.equal(a[[0, 2]], c[[0, 2]])


@every_memory
def test_causal(family):
    memory, T = make(family), 20
    x = torch.randn(1, T, 12, dtype=torch.float64)
    y, _ = memory(x, memory.init_state(1))
    for t in range(T):
        changed = x.clone()
        changed[:, t] += 1
        z, _ = memory(changed, memory.init_state(1))
        assert torch.equal(z[:, :t], y[:, :t])
        assert not torch.equal(z[:, t], y[:, t])


@every_memory
def test_gradients_reach_every_slow_weight(family):
    memory = build_memory(12, 2, TTTConfig(memory=family, chunk_size=6))  # as it starts
    y, _ = memory(torch.randn(2, 20, 12), memory.init_state(2))
    y.square().sum().backward()
    for name, p in memory.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.flatten(1).any(-1).all() if p.dim() > 1 else p.grad.any(), name


@every_ttt  # of every op: tests/contract
def test_gradcheck(family):
    memory = make(family, width=4, heads=2, chunk_size=2, conv_width=3)
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    _, start = memory(torch.randn(2, 3, 4, dtype=torch.float64), memory.init_state(2))
    start = clone(start)
    names = list(dict(memory.named_parameters()))
    leaves = [p.detach().clone().requires_grad_() for p in memory.parameters()]
    carried = [t.requires_grad_() for t in tensors(start) if t.dtype == torch.float64]

    def function(x, *rest):
        slow = dict(zip(names, rest, strict=False))
        *fast, conv = rest[len(names) :]
        state = MemoryState(type(start.fast)._make([*fast, start.fast.pos]), conv)
        y, end = torch.func.functional_call(memory, slow, (x, state))
        moved = [*(x for x in end.fast if x.is_floating_point()), end.conv]
        return y[:, ::2], mix @ torch.cat([x.flatten() for x in moved])

    inputs = [x, *leaves, *carried]
    mix = torch.randn(4, sum(t.numel() for t in carried), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        function, inputs, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=True
    )


@every_memory
def test_gradients_are_those_of_plain_autograd(family, monkeypatch):
    memory = make(family)
    x = torch.randn(2, 20, 12, dtype=torch.float64, requires_grad=True)

    def gradients():
        y, end = memory(x, memory.init_state(2))
        loss = y.square().sum() + end.conv.sum() + weights(memory, end)[0].square().sum()
        return torch.autograd.grad(loss, [x, *memory.parameters()])

    recomputed = gradients()
    base = "moshi_ttt.memory.base"
    monkeypatch.setattr(f"{base}.recomputed", lambda f, *args: f(*args))
    monkeypatch.setattr(
        f"{base}.recomputed_linear", lambda f, w, *args: torch.nn.functional.linear(f(*args), w)
    )
    for a, b in zip(recomputed, gradients(), strict=True):
        assert_near(a, b, 1e-12)


@every_memory
def test_what_a_frame_leaves_behind_is_no_inference_tensor(family):
    memory = make(family)
    x = torch.randn(1, 1, 12, dtype=torch.float64)
    with torch.no_grad():
        state = memory.init_state(1)
    versions = [t._version for t in tensors(state)]
    y = memory.step(x, state)
    assert not y.is_inference()
    assert not y.requires_grad
    assert not any(t.is_inference() for t in tensors(state))
    written = [n in ("k", "pos") for n in state.fast._fields] + [True]
    for t, version, must in zip(tensors(state), versions, written, strict=True):
        assert t._version > version or not must  # autograd sees that it was written
    y.clone().requires_grad_().mul(y).sum().backward()  # and may keep it
    y += 1


@every_memory
def test_no_state_below_float32(family):
    memory = make(family, torch.float32)
    full = {n: p.detach().clone() for n, p in memory.named_parameters()}
    memory.cast_projections(torch.bfloat16)
    for n, p in memory.named_parameters():
        assert p.dtype == (torch.bfloat16 if "proj" in n else torch.float32), n
        assert "proj" in n or torch.equal(p, full[n])
    x = torch.randn(2, 9, 12, dtype=torch.bfloat16)
    for m in (memory, memory.to(torch.bfloat16)):
        with torch.no_grad():
            y, state = m(x, m.init_state(2))
            z = m.step(x[:, :1], state)
            m.reset_state(state, torch.tensor([True, False]))
        assert y.dtype == z.dtype == torch.bfloat16
        for t in tensors(state):
            assert t.dtype in (torch.float32, torch.int64)
    assert {t.dtype for t in tensors(memory.double().init_state(1))} == {torch.float64, torch.int64}


@every_ttt
def test_decay_zero_has_no_parameter(family):
    memory = make(family, decay=0)
    assert memory.decay_logit is None
    assert memory.params().decay is None
    assert torch.allclose(
        torch.sigmoid(build_memory(12, 2, TTTConfig(memory=family, decay=0.01)).decay_logit),
        torch.tensor(0.01),
    )


@every_memory
def test_lr_scale_scales_the_write_and_at_zero_nothing_is_written(family):
    calm = {"decay": 1e-6} if "decay" in OPTIONS.get(family, {}) else {}
    memory, moved = make(family, **calm), []
    x = torch.randn(1, 60, 12, dtype=torch.float64)
    for scale in (0.0, 0.1, 1.0):
        memory.lr_scale = scale
        now, start = weights(memory, memory(x, memory.init_state(1))[1])
        moved.append((now - start).norm().item())
    assert moved[0] == 0
    assert 0 < moved[1] < moved[2]


@every_memory
def test_with_lr_scale_zero_a_state_that_moved_stays_where_it_is(family):
    memory = make(family)
    x = torch.randn(2, 42, 12, dtype=torch.float64)  # whole chunks: no frame waits to be written
    with torch.no_grad():
        _, state = memory(x, memory.init_state(2))
        now, start = weights(memory, state)
        memory.lr_scale = 0.0
        streamed = clone(state)
        stream(memory, x, streamed)
        assert not torch.equal(now[0], start)
        for end in (memory(x, state)[1], streamed):
            assert torch.equal(weights(memory, end)[0], now)


@every_memory
def test_no_rows(family):
    memory = make(family)
    x = torch.randn(0, 1, 12, dtype=torch.float64)
    with torch.no_grad():
        state = memory.init_state(0)
        y, _ = memory(x, state)
        for mask in (None, torch.zeros(0, dtype=torch.bool)):
            assert memory.step(x, state, mask).shape == y.shape == x.shape


@every_ttt
def test_the_weights_move_at_every_nth_chunk_and_a_row_counts_from_its_reset(family):
    memory, C = make(family, write_every=3), 6
    x, reset_at = torch.randn(2, 60, 12, dtype=torch.float64), 20
    with torch.no_grad():
        state = clone(memory.init_state(2))
    moved = [[], []]
    for t in range(60):
        if t == reset_at:
            memory.reset_state(state, torch.tensor([False, True]))
        before = state.fast.W1.clone()
        memory.step(x[:, t : t + 1], state)
        for b in range(2):
            if not torch.equal(before[b], state.fast.W1[b]):
                moved[b].append(t + 1)
    assert moved == [[3 * C, 6 * C, 9 * C], [3 * C, reset_at + 3 * C, reset_at + 6 * C]]


@every_memory
def test_a_memory_that_never_writes_keeps_its_start_and_learns_to_read_it(family):
    memory = make(family, writing=False)
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    y, state = memory(x, memory.init_state(2))
    with torch.no_grad():
        streamed = clone(memory.init_state(2))
    assert_near(stream(memory, x, streamed), y)
    for end in (state, streamed):
        now, start = weights(memory, end)
        for row in now:
            assert torch.equal(row, start)
    writer = make(family)
    writer.load_state_dict(memory.state_dict())
    assert (writer(x, writer.init_state(2))[0] - y).abs().max() > 1e-3
    y.square().sum().backward()
    q, k, v = memory.qkv_proj.weight.grad.chunk(3)
    start = [n for n in ("W1", "b1", "W2", "Wo", "Lg", "Ru") if hasattr(memory, n)]
    for g in (q, memory.o_proj.weight.grad, *(getattr(memory, n).grad for n in start)):
        assert g.flatten(1).any(-1).all()
    assert not k.any()
    assert not v.any()


def test_width_must_divide():
    with pytest.raises(ValueError, match="width 10 is not divisible by num_heads 4"):
        build_memory(10, 4, TTTConfig())


@every_memory
def test_what_the_forward_keeps(family):
    """Weights of every sqrt(n)-th chunk, q, k, v and o: never those of every chunk."""
    memory = make(family, torch.float32, width=32, chunk_size=2)
    x, kept = torch.randn(1, 128, 32), {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        memory(x, memory.init_state(1))
    own = {p.untyped_storage().data_ptr() for p in (x, *memory.parameters())}
    size = sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in own)
    state = sum(t.nbytes for t in memory.init_state(1).fast if t.dim() >= 4)
    frames = 8 * x.nbytes
    assert size <= 12 * state + frames


@pytest.mark.gpu
@every_setting()
def test_a_captured_graph_streams_as_the_forward(family, config):
    memory = make(family, torch.float32, **config).cuda()
    x = torch.randn(3, 20, 12, device="cuda")
    with torch.no_grad():
        wanted, _ = memory(x, memory.init_state(3))
        state, mask = memory.init_state(3), torch.ones(3, dtype=torch.bool, device="cuda")
        frame = x[:, :1].clone()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            memory.step(frame, state, mask)
        torch.cuda.current_stream().wait_stream(side)
        memory.reset_state(state, mask)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = memory.step(frame, state, mask)
        outs = []
        for t in range(20):
            frame.copy_(x[:, t : t + 1])
            graph.replay()
            outs.append(y.clone())
    assert (torch.cat(outs, 1) - wanted).abs().max() < 1e-4
