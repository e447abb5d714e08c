"""discriminator: heads on recorded features and scalar functions of time."""

from __future__ import annotations

import pytest
import torch

from diffdistill.losses import gan_discriminator
from diffdistill.networks.discriminator import Heads, Scalar

SHAPES = {"vector": (16,), "sequence": (16, 5), "map": (16, 4, 4), "video": (16, 2, 4, 4)}


@pytest.mark.parametrize("kind", SHAPES)
def test_a_head_learns_to_tell_two_sets_of_features_apart(kind):
    torch.manual_seed(0)
    heads = Heads({1: SHAPES[kind]})
    shape = (32, *SHAPES[kind])
    direction = torch.randn(SHAPES[kind])
    optimizer = torch.optim.Adam(heads.parameters(), 0.01)
    for _ in range(30):
        real, fake = torch.randn(shape) + direction, torch.randn(shape) - direction
        optimizer.zero_grad()
        gan_discriminator(heads({1: real}), heads({1: fake})).mean().backward()
        optimizer.step()
    assert heads({1: torch.randn(shape) + direction}).min() > heads({1: torch.randn(shape) - direction}).max()


def test_the_logit_is_the_mean_over_layers_and_over_the_positions_of_a_map():
    torch.manual_seed(0)
    heads = Heads({0: (8,), 2: (8, 3, 3)})
    features = {0: torch.randn(4, 8), 2: torch.randn(4, 8, 3, 3)}
    vector = heads.heads["0"](features[0])[:, 0]
    pixels = heads.heads["2"](features[2])
    assert pixels.shape == (4, 1, 3, 3)
    torch.testing.assert_close(heads(features), (vector + pixels.mean((1, 2, 3))) / 2)
    assert heads.layers == (0, 2)


def test_logits_of_narrow_features_are_float32():
    heads = Heads({0: (8,)})
    assert heads({0: torch.randn(4, 8).bfloat16()}).dtype == torch.float32


def test_each_sample_has_a_logit_of_its_own():
    torch.manual_seed(0)
    heads, x = Heads({0: (8, 3, 3)}), torch.randn(4, 8, 3, 3)
    torch.testing.assert_close(heads({0: x})[1:2], heads({0: x[1:2]}))


def test_a_scalar_fits_a_function_of_time():
    torch.manual_seed(0)
    scalar, t = Scalar(), torch.linspace(0, 3, 32)
    assert torch.equal(scalar(t), torch.zeros(32))
    optimizer = torch.optim.Adam(scalar.parameters(), 0.01)
    for _ in range(150):
        optimizer.zero_grad()
        (scalar(t) - torch.sin(t)).square().mean().backward()
        optimizer.step()
    assert (scalar(t) - torch.sin(t)).abs().max() < 0.15
