"""Transformers of diffusers with random weights, small enough to run in a test, and what to call them with."""

from __future__ import annotations

import diffusers
import torch

from diffdistill.kernels.ordering import Grid


def wan():
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 4, 12, 16),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 5, 16),
    }
    return model, inputs, Grid(4, 6, 8)


def cogvideox(patch_size_t=None):
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=8,
        num_layers=2, sample_width=16, sample_height=16, sample_frames=9, patch_size=2, patch_size_t=patch_size_t,
        temporal_compression_ratio=4, max_text_seq_length=6, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    angles = torch.rand(192, 16)
    inputs = {
        "hidden_states": torch.randn(2, 3 * (patch_size_t or 1), 4, 16, 16),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 6, 8),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }
    return model, inputs, Grid(3, 8, 8, text=6)


def cogvideox_1_5():
    """Its patches span frames."""
    return cogvideox(patch_size_t=2)


def hunyuan():
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=False, text_embed_dim=8,
        pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 4, 12, 12),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 7, 8),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]]),
        "pooled_projections": torch.randn(2, 8),
    }
    return model, inputs, Grid(4, 6, 6, text=7, text_first=False)


def ltx():
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=2, caption_channels=8,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 144, 4),
        "encoder_hidden_states": torch.randn(2, 5, 8),
        "timestep": torch.tensor([3.0, 7.0]),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        "num_frames": 3,
        "height": 6,
        "width": 8,
        "rope_interpolation_scale": (0.3, 32, 32),
    }
    return model, inputs, Grid(3, 6, 8)


def pixart():
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=32, sample_size=24, patch_size=2, caption_channels=8, use_additional_conditions=False,
        norm_num_groups=4,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 24, 28),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 5, 8),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return model, inputs, Grid(1, 12, 14)


def dit():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2, sample_size=24,
        patch_size=2, norm_num_groups=4, num_embeds_ada_norm=10,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(2, 4, 24, 24),
        "timestep": torch.tensor([3, 7]),
        "class_labels": torch.tensor([1, 2]),
    }
    return model, inputs, Grid(1, 12, 12)


def flux():
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8), guidance_embeds=False,
    )  # fmt: skip
    places = torch.meshgrid(torch.zeros(1), torch.arange(10.0), torch.arange(14.0), indexing="ij")
    inputs = {
        "hidden_states": torch.randn(2, 140, 4),
        "encoder_hidden_states": torch.randn(2, 7, 8),
        "pooled_projections": torch.randn(2, 8),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": torch.stack(places, -1).view(140, 3),
        "txt_ids": torch.zeros(7, 3),
    }
    return model, inputs, Grid(1, 10, 14, text=7)


MODELS = {f.__name__: f for f in (wan, cogvideox, cogvideox_1_5, hunyuan, ltx, pixart, dit, flux)}


def made(name):
    """A frozen model, its inputs by name and the grid of its tokens, the same ones every time."""
    torch.manual_seed(0)
    model, inputs, grid = MODELS[name]()
    for parameter in model.parameters():  # some blocks start as identities
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False), inputs, grid


def out(model, inputs):
    return model(**inputs, return_dict=False)[0]
