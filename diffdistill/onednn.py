"""Linear layers of float32 networks on a CPU, computed by oneDNN instead of the BLAS that torch was built with.

That is MKL as a rule, with which a step of a transformer took 1.4 to 1.6 times as long on an AMD processor with AVX-512
(docs/speed.md). Results are those of `torch.nn.functional.linear` up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from diffdistill.autodiff import transforms
from diffdistill.errors import UserError
from diffdistill.forward_rules import RULES, layer

LEAST = 2**22  # multiplications of a call: below, what an operator in Python costs outweighs the gain


@torch.library.custom_op("diffdistill::linear", mutates_args=(), device_types="cpu")
def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias.  x: [..., in].  weight: [out, in].  bias: [out] or None.  All of any strides."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)


def _gradients(ctx: Any, of_output: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    rows = of_output.flatten(0, -2)
    of_x = None if weight is None else product(of_output, weight.t(), None)
    of_weight = None if x is None else product(rows.t(), x.flatten(0, -2).t(), None)
    return of_x, of_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


product.register_autograd(_gradients, setup_context=_keep)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`product`, or torch's own within torch.func's transforms, for which it has no rules but that of `RULES`."""
    if torch.compiler.is_compiling():  # which is never within transforms, see `compile_network`
        return product(x, weight, bias)
    if has_torch_function_unary(x):
        return handle_torch_function(linear, (x,), x, weight, bias)
    return F.linear(x, weight, bias) if transforms() else product(x, weight, bias)


RULES[linear] = layer(product)


class OneDnnLinear(nn.Linear):
    """A linear layer, by oneDNN where its input is float32, on a CPU, without autocast and large enough."""

    def forward(self, input: Tensor) -> Tensor:
        plain = input.device.type != "cpu" or input.dtype != torch.float32 or input.ndim < 2
        small = input.numel() * self.out_features < LEAST
        if plain or small or self.weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return F.linear(input, self.weight, self.bias)
        return linear(input, self.weight, self.bias)


def by_onednn(network: nn.Module) -> None:
    """Let the linear layers of a network be computed by oneDNN; its weights and their names stay."""
    if not torch.backends.mkldnn.is_available():
        raise UserError("onednn", "needs a torch that was built with oneDNN", torch.__version__, "Set it to false.")
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDnnLinear
