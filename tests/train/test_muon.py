"""Steps of the kernels are orthogonal, all others AdamW's, and a pause changes neither."""

import copy

import pytest
import torch
from torch import nn

from ctsr.train.muon import RMS, Muon, moments


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(3, 12, 3), nn.Conv3d(12, 40, 1)).to(memory_format=torch.channels_last_3d)


def gradients(model: nn.Module, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g) * torch.logspace(0, -2, len(p)).view(
            -1, *[1] * (p.ndim - 1)
        )


def test_all_directions_of_a_kernel_move_alike():
    """Singular values of a step lie within a factor of two, where the gradient's span a decade; the root mean
    square of its elements is that of AdamW's steps."""
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = Muon(model.parameters(), lr=0.01, weight_decay=0.0)
    gradients(model, 1)
    kept = {n: p.grad.clone() for n, p in model.named_parameters()}
    optimizer.step()
    for name in ("0.weight", "1.weight"):
        step = (before[name] - model.state_dict()[name]).flatten(1) / 0.01
        values, of_gradient = torch.linalg.svdvals(step), torch.linalg.svdvals(kept[name].flatten(1))
        assert of_gradient.max() > 8 * of_gradient.min()
        assert values.max() < 2 * values.min(), name
        assert float(step.square().mean().sqrt()) == pytest.approx(RMS, rel=0.25), name
        assert (step * kept[name].flatten(1)).sum() > 0  # downhill
    assert all(torch.equal(p.grad, kept[n]) for n, p in model.named_parameters())


def test_what_is_no_kernel_takes_the_steps_of_adamw():
    model, peer = network(), network()
    ours = Muon(model.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    theirs = torch.optim.AdamW(peer.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    for seed in range(3):
        gradients(model, seed)
        gradients(peer, seed)
        ours.step()
        theirs.step()
    for (name, p), q in zip(model.named_parameters(), peer.parameters(), strict=True):
        assert torch.equal(p, q) == name.endswith("bias"), name
        assert tuple(k for k in ours.state[p] if k != "step") == moments(ours, p)
        assert tuple(k for k in theirs.state[q] if k != "step") == moments(theirs, q)
        assert int(ours.state[p]["step"]) == 3


def test_a_parameter_without_a_gradient_stays():
    model = network()
    before = copy.deepcopy(model.state_dict())
    Muon(model.parameters(), lr=0.01).step()
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
