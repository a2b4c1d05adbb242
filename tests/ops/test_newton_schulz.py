"""Newton-Schulz: what it does to singular values, and its gradients, of zero too."""

import pytest
import torch
from jaxtyping import TypeCheckError

from moshi_ttt.ops.newton_schulz import newton_schulz, newton_schulz_trace, newton_schulz_vjp

SHAPES = [(5, 5), (4, 9), (9, 4), (2, 3, 6, 4), (1, 1)]


def rand(*shape, seed=0, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)


def test_shapes_are_checked_in_the_tests_of_the_ops():
    with pytest.raises(TypeCheckError, match="batch m n"):
        newton_schulz(rand(3))


@pytest.mark.parametrize("shape", [(48, 48), (16, 64), (64, 16), (2, 3, 24, 16)])
def test_brings_singular_values_near_one(shape):
    values = torch.linalg.svdvals(newton_schulz(rand(*shape, dtype=torch.float32)))
    assert values.min() > 0.7
    assert values.max() < 1.2


def test_keeps_singular_vectors():
    U, S, V = torch.linalg.svd(rand(6, 4), full_matrices=False)
    out = newton_schulz((U * S) @ V)
    values = U.mT @ out @ V.mT
    torch.testing.assert_close(values, torch.diag(values.diagonal()), rtol=0, atol=1e-12)


def test_stays_in_the_column_space_of_its_input():
    x = rand(64, 4, dtype=torch.float32) @ rand(4, 64, seed=1, dtype=torch.float32)
    out = newton_schulz(x)
    basis = torch.linalg.qr(x[:, :4])[0]
    assert (out - basis @ (basis.mT @ out)).norm() < 1e-4 * out.norm()


def test_follows_its_formula():
    x = rand(3, 7)
    X = x / (x.norm() + 1e-7)
    for a, b, c in [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ]:
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    torch.testing.assert_close(newton_schulz(x), X, rtol=0, atol=1e-14)
    torch.testing.assert_close(newton_schulz(x.T), X.T, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_batches_are_matrices_apart(shape):
    x = rand(*shape)
    apart = [newton_schulz(m) for m in x.reshape(-1, *shape[-2:])]
    torch.testing.assert_close(newton_schulz(x), torch.stack(apart).view(shape), rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient(shape):
    x = rand(*shape).requires_grad_()
    assert torch.autograd.gradcheck(newton_schulz, x, eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_vjp_is_the_gradient(shape, size):
    x, y = (size * rand(*shape)).requires_grad_(), rand(*shape, seed=1)
    out = newton_schulz(x)
    (wanted,) = torch.autograd.grad(out, x, y)
    with torch.no_grad():
        same, trace = newton_schulz_trace(x)
        actual = newton_schulz_vjp(y, trace)
    assert torch.equal(same, out)
    assert (actual - wanted).abs().max() <= 1e-13 * wanted.abs().max().clamp(min=1)


def test_zero_stays_zero_and_passes_no_gradient():
    x = torch.stack([torch.zeros(3, 5), rand(3, 5, dtype=torch.float32)]).requires_grad_()
    out = newton_schulz(x)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    with torch.no_grad():
        by_hand = newton_schulz_vjp(torch.ones_like(out), newton_schulz_trace(x)[1])
    for zero in (out[0], grad[0], by_hand[0]):
        assert torch.equal(zero, torch.zeros(3, 5))
    for other in (out[1], grad[1], by_hand[1]):
        assert other.isfinite().all()
        assert other.abs().max() > 0


def test_runs_in_float32_or_better():
    x = rand(4, 6)
    out = newton_schulz(x.bfloat16())
    assert out.dtype == torch.float32
    assert torch.equal(out, newton_schulz(x.bfloat16().float()))
    assert newton_schulz(x).dtype == torch.float64
