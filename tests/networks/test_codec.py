"""codec: between pixels and what the process noises."""

from __future__ import annotations

import pytest
import torch

from diffdistill.networks.codec import PIXELS, codec_of


def test_pixels_pass_unchanged():
    x = torch.randn(2, 3)
    assert PIXELS.encode(x) is x
    assert PIXELS.decode(x) is x


@pytest.fixture(scope="module")
def vae():
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8,), latent_channels=4, norm_num_groups=4, scaling_factor=0.36, shift_factor=0.11
    ).eval()


@pytest.mark.parametrize("shift", [0.11, None])
def test_latents_are_shifted_then_scaled_and_decoding_undoes_it(vae, shift):
    vae.register_to_config(shift_factor=shift)
    codec, x = codec_of(vae), torch.randn(2, 3, 8, 8)
    mean = vae.encode(x).latent_dist.mean
    torch.testing.assert_close(codec.encode(x), (mean - (shift or 0)) * 0.36)
    torch.testing.assert_close(codec.decode(codec.encode(x)), vae.decode(mean).sample, rtol=1e-4, atol=1e-5)


def test_decoding_is_differentiable(vae):
    z = torch.randn(1, 4, 8, 8, requires_grad=True)
    codec_of(vae).decode(z).square().sum().backward()
    assert z.grad.abs().max() > 0
