"""The chosen attention inside diffusers models: all blocks on is the stock result, roles, backends, refusals."""

from __future__ import annotations

import copy
import sys
import types

import diffusers
import pytest
import torch
from tiny_diffusers import made, out

from diffdistill.autodiff import jvp
from diffdistill.errors import UserError
from diffdistill.kernels.attention.layout import BlockLayout
from diffdistill.kernels.attention.operators import recorded_backends
from diffdistill.networks import attention
from diffdistill.networks.attention import BlockSparse, explain, restore_attention, set_attention
from diffdistill.networks.call import Call, checkpointed, enter

SELF = {"wan": 2, "cogvideox": 2, "pixart": 2, "dit": 2, "flux": 2}  # self- or joint attentions of each


@pytest.mark.parametrize("name", SELF)
def test_all_blocks_on_is_the_stock_processor(name):
    model, inputs, grid = made(name)
    tokens = grid.length
    stock = out(model, inputs)
    full = BlockLayout.full(tokens, tokens)
    set_attention(model, BlockSparse(full), roles=None)
    with recorded_backends() as ran:
        torch.testing.assert_close(out(model, inputs), stock, rtol=1e-4, atol=1e-5)
    assert len(ran) == SELF[name]  # cross-attention is left dense
    report = explain(model)
    assert len(report) == SELF[name] and all("block_sparse" in row["ran"] for row in report.values())


@pytest.mark.parametrize("name", SELF)
def test_a_sparse_layout_changes_the_result_and_is_removed_again(name):
    model, inputs, grid = made(name)
    tokens = grid.length
    stock = out(model, inputs)
    processors = {n: type(m.processor) for n, m in model.named_modules() if hasattr(m, "processor")}
    num = BlockLayout.full(tokens, tokens, 64, 64).num_q
    layout = BlockLayout.from_mask(torch.eye(num, dtype=torch.bool), tokens, tokens, 64, 64)
    set_attention(model, BlockSparse(lambda q, k: layout), roles=None)
    assert (out(model, inputs) - stock).abs().max() > 1e-3
    restore_attention(model)
    assert {n: type(m.processor) for n, m in model.named_modules() if hasattr(m, "processor")} == processors
    assert torch.equal(out(model, inputs), stock)
    assert not explain(model)


@pytest.mark.parametrize("name", ["wan", "pixart"])
def test_sdpa_and_math_take_cross_attention_with_its_mask_too(name):
    model, inputs, _ = made(name)
    stock = out(model, inputs)
    for value, exact in ((attention.sdpa, True), (attention.math, False)):
        set_attention(model, value, roles=None)
        found = out(model, inputs)
        assert torch.equal(found, stock) if exact else torch.allclose(found, stock, rtol=1e-4, atol=1e-5)
        assert len(explain(model)) == 4
        assert all(row["ran"] == value.explain() for row in explain(model).values())


def test_math_and_block_sparse_have_a_rule_for_forward_mode_and_agree():
    model, inputs, grid = made("dit")
    tokens = grid.length
    x = inputs.pop("hidden_states")

    def network(x):
        return out(model, {**inputs, "hidden_states": x})

    with pytest.raises(Exception, match="forward"):
        torch.func.jvp(network, (x,), (torch.ones_like(x),))
    set_attention(model, attention.math, roles=None)
    wanted = torch.func.jvp(network, (x,), (torch.ones_like(x),))[1]
    set_attention(model, BlockSparse(BlockLayout.full(tokens, tokens)), roles=None)
    torch.testing.assert_close(jvp(network, (x,), (torch.ones_like(x),))[1], wanted, rtol=1e-4, atol=1e-4)


def test_only_the_named_roles_are_changed():
    model, inputs, grid = made("dit")
    tokens = grid.length
    stock = out(model, inputs)
    half = BlockLayout.from_mask(torch.eye(2, dtype=torch.bool), tokens, tokens)
    set_attention(model, BlockSparse(half))
    set_attention(model, BlockSparse(BlockLayout.full(tokens, tokens), backend="reference"), roles=("fake_score",))
    assert torch.equal(out(model, inputs), stock)
    assert all(row["ran"] == "the stock processor" for row in explain(model).values())
    with enter(Call("teacher")):
        assert torch.equal(out(model, inputs), stock)
    with enter(Call("student")):
        assert not torch.allclose(out(model, inputs), stock, atol=1e-3)
    with enter(Call("fake_score")), recorded_backends() as ran:
        torch.testing.assert_close(out(model, inputs), stock, rtol=1e-4, atol=1e-5)
    assert ran == ["reference", "reference"]
    assert set(next(iter(explain(model).values()))) == {"student", "fake_score", "ran"}
    assert all(row["ran"].endswith(": reference ran") for row in explain(model).values())


def test_a_network_can_be_copied_and_saved_with_its_attention(tmp_path):
    model, inputs, grid = made("dit")
    tokens = grid.length
    set_attention(model, BlockSparse(BlockLayout.full(tokens, tokens)), roles=None)
    wanted = out(model, inputs)
    double = copy.deepcopy(model)
    assert torch.equal(out(double, inputs), wanted)
    restore_attention(double)
    assert explain(model) and not explain(double)
    model.save_pretrained(tmp_path)
    again = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path)
    torch.testing.assert_close(out(again, inputs), wanted, rtol=1e-4, atol=1e-5)


def test_gradients_pass_and_checkpointing_repeats_the_roles_attention():
    model, inputs, grid = made("dit")
    tokens = grid.length
    half = BlockLayout.from_mask(torch.eye(2, dtype=torch.bool), tokens, tokens)
    set_attention(model, BlockSparse(half))

    def gradient():
        x = inputs["hidden_states"].clone().requires_grad_()
        with enter(Call("student")):
            loss = out(model, {**inputs, "hidden_states": x}).square().sum()
        return torch.autograd.grad(loss, x)[0]

    plain = gradient()
    model.enable_gradient_checkpointing(checkpointed)
    with recorded_backends() as ran:
        torch.testing.assert_close(gradient(), plain)
    assert len(ran) == 4  # two blocks, each twice


def test_layers_named_dense_stay_stock():
    model, inputs, grid = made("wan")
    tokens = grid.length
    set_attention(model, BlockSparse(BlockLayout.full(tokens, tokens), dense_layers=(0,)), roles=None)
    assert list(explain(model)) == ["blocks.1.attn1"]
    set_attention(model, attention.math, roles=None)
    set_attention(model, BlockSparse(BlockLayout.full(tokens, tokens), dense_layers=(1,)), roles=None)
    out(model, inputs)
    sparse = [name for name, row in explain(model).items() if "block_sparse" in row["ran"]]
    assert sparse == ["blocks.0.attn1"]  # what the earlier calls gave the others is gone
    assert all(row["ran"] == "the stock processor" for name, row in explain(model).items() if name not in sparse)
    with pytest.raises(UserError, match="dense_layers must be indices of the network's 2 self-attentions"):
        set_attention(model, BlockSparse(BlockLayout.full(tokens, tokens), dense_layers=(2,)))


def test_a_processor_that_never_calls_torchs_attention_is_refused():
    from diffusers.models.attention_processor import AttnProcessor

    model, inputs, grid = made("dit")
    tokens = grid.length
    for block in model.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())
    set_attention(model, BlockSparse(BlockLayout.full(tokens, tokens)), roles=None)
    with pytest.raises(UserError, match="attention must replace .* AttnProcessor"):
        out(model, inputs)


def test_masks_of_tokens_become_a_bias_of_keys_or_are_refused():
    q, k, v = (torch.randn(2, 2, 64, 16) for _ in range(3))
    layout = BlockLayout.full(64, 64)
    keys = torch.rand(2, 1, 1, 64) < 0.7
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, keys)
    torch.testing.assert_close(BlockSparse(layout)(q, k, v, mask=keys), wanted, rtol=1e-4, atol=1e-5)
    added = torch.zeros(keys.shape).masked_fill(~keys, -torch.inf)
    torch.testing.assert_close(BlockSparse(layout)(q, k, v, mask=added), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="attention must take masks of keys alone"):
        BlockSparse(layout)(q, k, v, mask=torch.ones(1, 1, 64, 64, dtype=torch.bool))
    with pytest.raises(UserError, match="attention must take the model's mask of tokens, got flex"):
        attention.flex(q, k, v, mask=keys)
    with pytest.raises(UserError, match="attention must be without causal masks and dropout"):
        attention._answer(attention.sdpa, q, k, v, is_causal=True)
    for value in (attention.sdpa, attention.math):
        with pytest.raises(UserError, match="layout must be None for an attention without blocks"):
            value(q, k, v, layout=layout)


@pytest.mark.slow
def test_flex_is_the_stock_result_in_inference():
    model, inputs, _ = made("dit")
    stock = out(model, inputs)
    set_attention(model, attention.flex, roles=None)
    with recorded_backends() as ran:
        torch.testing.assert_close(out(model, inputs), stock, rtol=1e-4, atol=1e-5)
    assert ran == ["flex", "flex"]


@pytest.mark.slow
def test_a_compiled_network_keeps_its_attention():
    model, inputs, grid = made("dit")
    tokens = grid.length
    set_attention(model, BlockSparse(BlockLayout.from_mask(torch.eye(2, dtype=torch.bool), tokens, tokens)), roles=None)
    wanted = out(model, inputs)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs, return_dict=False)[0], wanted, rtol=1e-4, atol=1e-5)


def test_xformers_that_does_not_load_names_the_build_that_fits(monkeypatch):
    attention._why_no_xformers.cache_clear()
    monkeypatch.setitem(sys.modules, "xformers", None)
    model, _, _ = made("dit")
    release = torch.__version__.partition("+")[0]
    with pytest.raises(UserError, match=f"attention must be able to load its kernels.*built for torch {release}"):
        set_attention(model, attention.xformers)
    assert not explain(model)
    attention._why_no_xformers.cache_clear()


def test_xformers_is_handed_tokens_before_heads(monkeypatch):
    """Its binary is not needed: a module of its name that computes by torch's attention."""

    def efficient(q, k, v, attn_bias=None, scale=None):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_bias, scale=scale).transpose(1, 2)

    names = ("xformers", "xformers.ops", "xformers._cpp_lib")
    modules = {name: types.ModuleType(name) for name in names}
    modules["xformers.ops"].memory_efficient_attention = efficient
    modules["xformers._cpp_lib"]._register_extensions = lambda: None
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    attention._why_no_xformers.cache_clear()
    model, inputs, _ = made("pixart")
    stock = out(model, inputs)
    set_attention(model, attention.xformers, roles=None)
    torch.testing.assert_close(out(model, inputs), stock, rtol=1e-4, atol=1e-5)
    attention._why_no_xformers.cache_clear()


def test_what_is_no_attention_is_refused():
    model, _, grid = made("dit")
    tokens = grid.length
    full = BlockLayout.full(tokens, tokens)
    with pytest.raises(UserError, match="attention must be a value, got 'math'"):
        set_attention(model, "math")
    with pytest.raises(UserError, match="roles must be names of roles"):
        set_attention(model, attention.math, roles="student")
    with pytest.raises(UserError, match="network must have attention modules, got Linear"):
        set_attention(torch.nn.Linear(2, 2), attention.math)
    with pytest.raises(UserError, match="mask must be a BlockLayout or a function"):
        BlockSparse(0.1)
    with pytest.raises(UserError, match="backend must be one of"):
        BlockSparse(full, backend="cuda")
