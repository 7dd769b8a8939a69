"""Muon: its matrices against singular value decompositions and PyTorch's own Muon, all else against PyTorch's Adam."""

import pytest
import torch

from ddpm_lib.muon import ITERATIONS, QUINTIC, Muon, orthogonal


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5, 5), (4, 30), (30, 4), (1, 7), (7, 1)])
def test_a_matrix_keeps_its_directions_and_its_singular_values_go_through_the_quintic(shape):
    matrix = normal(*shape)
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.square().sum().sqrt()
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        values = a * values + b * values**3 + c * values**5
    torch.testing.assert_close(orthogonal(matrix), u @ values.diag() @ v, rtol=0, atol=1e-6)


def test_singular_values_end_near_one():
    for seed in range(20):
        values = torch.linalg.svdvals(orthogonal(normal(16, 144, seed=seed, dtype=torch.float32)))
        assert 0.65 < values.min() <= values.max() < 1.25


@pytest.mark.parametrize("weight_decay", [0.0, 3.0])
def test_matrices_move_as_with_the_muon_of_pytorch(weight_decay):
    """Which computes in bfloat16: hence the tolerance, of 2% of a step's length."""
    start = normal(24, 40, dtype=torch.float32)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    mine = Muon([ours], lr=1e-2, weight_decay=weight_decay)
    reference = torch.optim.Muon([theirs], lr=1e-2, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    for i in range(6):
        for p, optimiser in ((ours, mine), (theirs, reference)):
            p.grad = normal(24, 40, seed=i, dtype=torch.float32)
            optimiser.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved


def test_a_convolution_is_a_matrix_with_a_row_for_each_output():
    weight = normal(6, 3, 2, 2).requires_grad_()
    flat = weight.detach().flatten(1).clone().requires_grad_()
    for p in (weight, flat):
        optimiser = Muon([p], lr=0.1)
        p.grad = normal(6, 12, seed=1).view(p.shape)
        optimiser.step()
    torch.testing.assert_close(weight.flatten(1), flat)


@pytest.mark.parametrize("shape", [(9,), (7, 3)], ids=["vector", "embedding"])
def test_vectors_and_embeddings_move_as_with_the_adam_of_pytorch(shape):
    ours, theirs = normal(*shape).requires_grad_(), normal(*shape).requires_grad_()
    mine = Muon([ours], lr=1e-2, betas=(0.8, 0.95), weight_decay=0.5, embeddings=[ours] if len(shape) == 2 else [])
    adam = torch.optim.Adam([theirs], lr=1e-2, betas=(0.8, 0.95))
    for i in range(5):
        for p, optimiser in ((ours, mine), (theirs, adam)):
            p.grad = normal(*shape, seed=i)
            optimiser.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


def test_what_has_no_gradient_stays():
    p = normal(4, 4).requires_grad_()
    before = p.detach().clone()
    Muon([p], lr=1.0).step()
    assert torch.equal(p, before)
