"""Masks over a grid of tokens inside diffusers models: orders, text, key masks, grids, times, checkpointing, roles."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cache

import diffusers
import pytest
import torch
import torch.nn.functional as F
from tiny_diffusers import MODELS, made, out
from torch import nn

from diffdistill.denoiser import Denoiser
from diffdistill.errors import UserError
from diffdistill.kernels.attention.layout import BlockLayout
from diffdistill.kernels.attention.masks.asa import ASA
from diffdistill.kernels.attention.masks.base import Mask
from diffdistill.kernels.attention.masks.disk import Disk
from diffdistill.kernels.attention.masks.frame_tile import FrameTile
from diffdistill.kernels.attention.masks.full import Full
from diffdistill.kernels.attention.masks.sparge import Sparge
from diffdistill.kernels.attention.masks.sta import SlidingTile
from diffdistill.kernels.attention.masks.vsa import VSA
from diffdistill.kernels.attention.operators import recorded_backends
from diffdistill.kernels.ordering import Grid, ordered
from diffdistill.networks.attention import BlockSparse, explain, restore_attention, set_attention
from diffdistill.networks.call import Call, checkpointed, enter
from diffdistill.networks.lora import LoraSpec
from diffdistill.networks.roles import Networks, Role
from diffdistill.networks.token_grid import current_grid
from diffdistill.process import EDM, X0

close = {"rtol": 1e-4, "atol": 1e-5}


@cache
def shuffled(grid, holes):
    """A random order; with holes, of every block of 64 slots the last 14 are padding."""
    order = torch.randperm(grid.tokens, generator=torch.Generator().manual_seed(grid.width))
    if holes:
        order = F.pad(order, (0, -len(order) % 50), value=-1).view(-1, 50)
        order = F.pad(order, (0, 14), value=-1).flatten()
    return ordered(grid, order)


@dataclass(frozen=True, eq=False)
class Shuffled(Mask):
    """Of each query block the `share` of key blocks that fits it best, in a random order of tokens."""

    share: float = 1.0
    holes: bool = False
    grids: list[Grid] = field(default_factory=list)  # that it was asked for

    def ordering(self, grid):
        return shuffled(grid, self.holes)

    def layout(self, q, k, grid, scale):
        self.grids.append(grid)
        slots = q.shape[2]
        q, k = (F.pad(x, (0, 0, 0, -slots % 64)).unflatten(2, (-1, 64)).mean(3) for x in (q, k))
        scores = q @ k.transpose(-1, -2)
        best = scores.topk(max(1, int(self.share * scores.shape[-1])), -1).indices
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
        return BlockLayout.from_mask(mask, slots, slots, 64, 64, self.ordering(grid).valid(64))


@dataclass(frozen=True, eq=False)
class Dense:
    """What a mask computes, by torch's attention under a mask of tokens in the model's order."""

    mask: Mask
    grid: Grid
    cross = False

    def __call__(self, q, k, v, *, scale=None, layout=None, mask=None):
        order = self.mask.ordering(self.grid)
        layout = self.mask.layout(order.apply(q), order.apply(k), self.grid, scale or q.shape[-1] ** -0.5)
        tokens = layout.token_mask()[..., order.inverse, :][..., order.inverse]
        return F.scaled_dot_product_attention(q, k, v, tokens if mask is None else tokens & mask, scale=scale)

    def ready(self):
        pass

    def explain(self):
        return "dense"


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_every_block_in_another_order_is_the_stock_processor(name, holes):
    model, inputs, grid = made(name)
    stock = out(model, inputs)
    mask = Shuffled(holes=holes)
    set_attention(model, BlockSparse(mask), roles=None)
    with recorded_backends() as ran:
        torch.testing.assert_close(out(model, inputs), stock, **close)
    assert mask.grids == [grid, grid] and len(ran) == 2
    assert current_grid() is None


def all_on(kind, grid):
    """A shipped mask with every block on, for a grid of these few tokens."""
    tiles = tuple(-(-size // edge) for size, edge in zip(grid.sizes, (4, 4, 4), strict=True))
    return {
        "asa": ASA(density=1.0),
        "asa64": ASA(density=1.0, block=64, sampled=64, pooling="peak"),
        "vsa": VSA(density=1.0),
        "sparge": Sparge(density=1.0, theta=-1.0),
        "sta": SlidingTile(window=tiles, tile=(4, 4, 4)),
        "frame_tile": FrameTile(references=grid.frames),
        "disk": Disk(radius=100.0),
        "full": Full(),
    }[kind]


@pytest.mark.parametrize("kind", ["asa", "asa64", "vsa", "sparge", "sta", "frame_tile", "disk", "full"])
@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_a_shipped_mask_with_every_block_on_is_the_stock_processor(name, kind):
    """RoPE, text tokens, the curve and padded tiles are all right, or the outputs would differ."""
    model, inputs, grid = made(name)
    stock = out(model, inputs)
    set_attention(model, BlockSparse(all_on(kind, grid)), roles=None)
    torch.testing.assert_close(out(model, inputs), stock, **close)


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_asa_in_a_model_is_its_mask_of_tokens(name):
    model, inputs, grid = made(name)
    stock = out(model, inputs)
    mask = ASA(density=0.4, block=64, force_text=False)
    set_attention(model, Dense(mask, grid), roles=None)
    wanted = out(model, inputs)
    set_attention(model, BlockSparse(mask), roles=None)
    torch.testing.assert_close(out(model, inputs), wanted, **close)
    assert (wanted - stock).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_arguments_may_be_given_by_position(name):
    model, inputs, grid = made(name)
    mask = Shuffled()
    set_attention(model, BlockSparse(mask), roles=None)
    model(*inputs.values())  # these lie in the order of the arguments
    assert mask.grids == [grid, grid]


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_sparse_mask_is_stock_attention_under_its_mask_of_tokens(name, holes):
    model, inputs, grid = made(name)
    stock = out(model, inputs)
    mask = Shuffled(0.5, holes)
    set_attention(model, Dense(mask, grid), roles=None)
    wanted = out(model, inputs)
    set_attention(model, BlockSparse(mask), roles=None)
    torch.testing.assert_close(out(model, inputs), wanted, **close)
    assert (wanted - stock).abs().max() > 1e-3


def test_cross_attention_and_text_refiners_stay_stock_and_are_not_counted():
    model, _, _ = made("ltx")
    set_attention(model, BlockSparse(Shuffled(), dense_layers=(0,)))
    assert list(explain(model)) == ["transformer_blocks.1.attn1"]
    model, inputs, _ = made("hunyuan")
    set_attention(model, BlockSparse(Shuffled(), dense_layers=(0,)), roles=None)
    assert list(explain(model)) == ["single_transformer_blocks.0.attn"]
    out(model, inputs)
    row = explain(model)["single_transformer_blocks.0.attn"]
    assert row["every call"].startswith("block_sparse_attention over Shuffled(share=1.0")
    assert row["ran"].endswith(": cpu ran") or row["ran"].endswith(": gather ran")


def test_a_grid_that_is_not_known_or_does_not_fit_is_refused_by_name():
    unet = diffusers.UNet2DModel(
        8, 3, 3, block_out_channels=(32,), down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",),
        layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    with pytest.raises(UserError, match="grid must be given for models other than Wan.*UNet2DModel with .*grid=Grid"):
        set_attention(unet, BlockSparse(Shuffled()))
    assert not explain(unet)
    both = nn.ModuleDict({"wan": made("wan")[0], "unet": unet})
    with pytest.raises(UserError, match="grid must be given .* with unet"):
        set_attention(both, BlockSparse(Shuffled()))
    assert not explain(both) and not both["wan"]._forward_pre_hooks
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([1])
    stock = unet(x, t).sample
    set_attention(unet, BlockSparse(Shuffled(), grid=Grid(1, 8, 8)), roles=None)
    torch.testing.assert_close(unet(x, t).sample, stock, **close)
    model, inputs, _ = made("wan")
    set_attention(model, BlockSparse(Shuffled(), grid=Grid(4, 6, 9)), roles=None)
    with pytest.raises(UserError, match="grid must match the sequence's 192 tokens, got 216: 4 x 6 x 9"):
        out(model, inputs)
    set_attention(model, BlockSparse(Shuffled()), roles=None)
    with pytest.raises(UserError, match="grid must be told by the model's inputs or given"):
        model.blocks[0](torch.randn(2, 192, 24), torch.randn(2, 5, 24), torch.randn(2, 6, 24), None)
    with pytest.raises(UserError, match="grid must be a Grid, for a Mask"):
        BlockSparse(BlockLayout.full(64, 64), grid=Grid(1, 8, 8))
    with pytest.raises(UserError, match="network must have attention modules, got Linear"):
        set_attention(nn.Linear(2, 2), BlockSparse(Shuffled()))


def test_a_model_called_with_coordinates_does_not_tell_its_grid():
    model, inputs, grid = made("ltx")
    wanted = out(model, inputs)
    places = torch.meshgrid(*(torch.arange(float(size)) for size in grid.sizes), indexing="ij")
    scale = torch.tensor(inputs.pop("rope_interpolation_scale")).view(3, 1)
    coordinates = (torch.stack(places).view(3, -1) * scale).expand(2, -1, -1)
    inputs = {**inputs, "video_coords": coordinates} | dict.fromkeys(("num_frames", "height", "width"))
    set_attention(model, BlockSparse(Shuffled()))
    torch.testing.assert_close(out(model, inputs), wanted, **close)  # other roles need none
    with enter(Call("student")), pytest.raises(UserError, match="grid must be told by the model's inputs or given"):
        out(model, inputs)
    set_attention(model, BlockSparse(Shuffled(), grid=grid))
    with enter(Call("student")):
        torch.testing.assert_close(out(model, inputs), wanted, **close)


def test_a_processor_that_never_calls_torchs_attention_is_refused():
    from diffusers.models.attention_processor import AttnProcessor

    model, inputs, _ = made("dit")
    for block in model.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())
    set_attention(model, BlockSparse(Shuffled()), roles=None)
    with pytest.raises(UserError, match="attention must replace .* AttnProcessor"):
        out(model, inputs)
    assert current_grid() is None


# -- times ----------------------------------------------------------------------------------------------------


def at(model, inputs, *times):
    with enter(Call("student", torch.tensor(times))):
        return out(model, inputs)


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_each_sample_above_the_bound_attends_densely(name):
    model, inputs, _ = made(name)
    stock = out(model, inputs)
    set_attention(model, BlockSparse(Shuffled(0.5)))
    sparse = at(model, inputs, 0.1, 0.1)
    set_attention(model, BlockSparse(Shuffled(0.5), dense_above=0.9))
    with recorded_backends() as ran:
        assert torch.equal(at(model, inputs, 0.95, 1.0), stock)
    assert ran == ["sdpa", "sdpa"]
    assert all(row["ran"].endswith(": sdpa ran") for row in explain(model).values())
    assert torch.equal(at(model, inputs, 0.9, 0.1), sparse)
    torch.testing.assert_close(at(model, inputs, 0.95, 0.9), torch.stack((stock[0], sparse[1])), **close)
    torch.testing.assert_close(at(model, inputs, 0.9, 0.95), torch.stack((sparse[0], stock[1])), **close)


def test_a_layout_per_sample_follows_its_sample():
    q, k, v = (torch.randn(3, 2, 128, 16) for _ in range(3))
    layout = BlockLayout.from_mask(torch.tensor([[[1, 0], [0, 1]], [[0, 1], [1, 0]], [[1, 1], [0, 1]]]).bool()[:, None],
                                   128, 128, 64, 64)  # fmt: skip
    sparse = BlockSparse(layout)(q, k, v)
    with enter(Call("student", torch.tensor([0.1, 0.2, 1.0]))):
        found = BlockSparse(layout, dense_above=0.5)(q, k, v)
    torch.testing.assert_close(found[:2], sparse[:2])
    torch.testing.assert_close(found[2], F.scaled_dot_product_attention(q, k, v)[2], **close)


def test_a_bound_in_time_needs_a_call_with_a_time_for_each_sample():
    model, inputs, _ = made("wan")
    set_attention(model, BlockSparse(Shuffled(), dense_above=0.9), roles=None)
    with pytest.raises(UserError, match="dense_above needs the time of the call.*got no call.*a pipeline"):
        out(model, inputs)
    with enter(Call("student")), pytest.raises(UserError, match="dense_above needs .* got a call of student without t"):
        out(model, inputs)
    with pytest.raises(UserError, match="dense_above needs one time for each of the 2 samples"):
        at(model, inputs, 0.1, 0.2, 0.3)
    with pytest.raises(UserError, match="dense_above must be a number or None"):
        BlockSparse(Shuffled(), dense_above="0.9")


# -- activation checkpointing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [None, checkpointed])
@pytest.mark.parametrize("name", ["wan", "cogvideox", "hunyuan"])
def test_checkpointing_repeats_the_grid_and_the_call_of_each_forward_pass(name, function):
    """Two passes, of which the second has height and width exchanged, before one backward pass."""
    model, inputs, _ = made(name)
    mask = Shuffled(0.5)
    set_attention(model, BlockSparse(mask, dense_above=0.5))

    def gradient():
        x = inputs["hidden_states"].clone().requires_grad_()
        loss = at(model, {**inputs, "hidden_states": x}, 0.1, 0.9).square().sum()
        with enter(Call("teacher")):
            loss = loss + out(model, {**inputs, "hidden_states": x}).square().sum()
        turned = {**inputs, "hidden_states": x.transpose(-1, -2)}
        loss = loss + at(model, turned, 0.1, 0.1).square().sum()
        return torch.autograd.grad(loss, x)[0]

    plain, grids = gradient(), list(mask.grids)
    model.enable_gradient_checkpointing(*[function] * (function is not None))
    mask.grids.clear()
    torch.testing.assert_close(gradient(), plain, **close)
    assert mask.grids[:4] == grids and sorted(map(str, mask.grids)) == sorted(map(str, grids * 2))


# -- roles ----------------------------------------------------------------------------------------------------


class Video(nn.Module):
    """A tiny Wan as a network of this package."""

    closed_form, null, embedding_name, embedding_width = False, None, None, 0
    process, kind = EDM.between(0.002, 80.0), X0

    def __init__(self, wan):
        super().__init__()
        self.wan = wan

    @property
    def blocks(self):
        return list(self.wan.blocks)

    def scale(self, t):
        return torch.rsqrt(t.square() + 1)

    def time(self, t):
        return t

    def forward(self, x, t_net, cond):
        return self.wan(hidden_states=x, timestep=t_net, encoder_hidden_states=cond["text"], return_dict=False)[0]


def test_one_backbone_is_a_sparse_student_and_a_dense_teacher():
    model, inputs, grid = made("wan")
    x, cond, t = inputs["hidden_states"], {"text": inputs["encoder_hidden_states"]}, torch.tensor([0.5, 3.0])
    plain = Denoiser(Video(copy.deepcopy(model)))
    networks = Networks(Video(model), {"student": Role(), "fake_score": Role()}, tuple(x.shape[1:]),
                        {name: value[:1] for name, value in cond.items()},
                        modes={"student": "lora", "fake_score": "lora"}, lora=LoraSpec(2))  # fmt: skip
    stock = plain(x, t, cond)
    mask = Shuffled(0.5)
    set_attention(networks.teacher, BlockSparse(mask, dense_above=1.0))
    assert torch.equal(networks["teacher"](x, t, cond), stock) and not mask.grids
    torch.testing.assert_close(networks["fake_score"](x, t, cond), stock, **close)
    set_attention(plain.network, Dense(mask, grid), roles=None)
    wanted = torch.stack((plain(x, t, cond)[0], stock[1]))
    torch.testing.assert_close(networks["student"](x, t, cond), wanted, **close)
    networks.train_only(("student",))
    networks["student"](x, t, cond).square().sum().backward()
    assert all(weight.grad is None for weight in networks.weights("fake_score"))
    assert any(weight.grad is not None and weight.grad.any() for weight in networks.weights("student"))


# -- the network as a whole -----------------------------------------------------------------------------------


def test_a_copy_keeps_its_masks_and_restoring_takes_every_hook_away():
    model, inputs, _ = made("wan")
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    stock = out(model, inputs)
    set_attention(model, BlockSparse(Shuffled(0.5)), roles=None)
    set_attention(model, BlockSparse(Shuffled(0.5)), roles=None)
    assert len(model._forward_pre_hooks) == hooks[0][0] + 1
    model.enable_gradient_checkpointing(checkpointed)
    wanted = out(model, inputs)
    double = copy.deepcopy(model)
    assert torch.equal(out(double, inputs), wanted)
    for network in (double, model):
        restore_attention(network)
        assert torch.equal(out(network, inputs), stock)
        assert [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in network.modules()] == hooks
        assert network._gradient_checkpointing_func is checkpointed


@pytest.mark.slow
def test_a_compiled_network_knows_its_grid():
    model, inputs, _ = made("wan")
    set_attention(model, BlockSparse(Shuffled(0.5)), roles=None)
    turned = {**inputs, "hidden_states": inputs["hidden_states"].transpose(-1, -2).contiguous()}
    wanted, other = out(model, inputs), out(model, turned)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs, return_dict=False)[0], wanted, **close)
    torch.testing.assert_close(compiled(**turned, return_dict=False)[0], other, **close)
