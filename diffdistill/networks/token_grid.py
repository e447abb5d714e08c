"""The grid of tokens of the forward pass in progress, read off what a diffusers transformer is called with.

`announce` hooks it: within a forward pass `current_grid` tells masks which token lies where. The model's own activation
checkpointing repeats its blocks within the same grid and the same call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.kernels.ordering import Grid
from diffdistill.networks.call import current_call, enter
from diffdistill.tracing import constant

Inputs = Mapping[str, Any]  # of a model's forward, by name

_current: ContextVar[Grid | None] = ContextVar("grid", default=None)


def current_grid() -> Grid | None:
    """Of the forward pass in progress; None outside every model that `announce` knows, or if its inputs do not tell."""
    return _current.get()


def telling(network: nn.Module) -> dict[str, nn.Module]:
    """The models in `network` whose inputs tell the grid, by name; "" for itself."""
    return {name: module for name, module in network.named_modules() if _reader(module) is not None}


def announce(network: nn.Module) -> None:
    """Make them tell it in every forward pass."""
    silence(network)  # a second time is as once
    for module in telling(network).values():
        module.register_forward_pre_hook(_enter, with_kwargs=True)
        module.register_forward_hook(_leave, always_call=True)  # after errors too


def silence(network: nn.Module) -> None:
    """Undo `announce`."""
    module: Any
    for module in network.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _enter]:
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
        for key in [key for key, hook in module._forward_hooks.items() if hook is _leave]:
            del module._forward_hooks[key], module._forward_hooks_always_called[key]
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(checkpoint, _Repeating):
            module._gradient_checkpointing_func = checkpoint.checkpoint


def is_text(network: nn.Module, name: str) -> bool:
    """Whether the module of this name lies where a model attends over its text alone."""
    path = name.split(".")
    parents = (network.get_submodule(".".join(path[:depth])) for depth in range(len(path)))
    return any(cls.__name__ in TEXT for parent in parents for cls in type(parent).__mro__)


# -- what models are called with ------------------------------------------------------------------------------


def _wan(config: Any, inputs: Inputs) -> Grid:
    frames, height, width = inputs["hidden_states"].shape[2:]
    p_t, p_h, p_w = config.patch_size
    return Grid(frames // p_t, height // p_h, width // p_w)


def _cogvideox(config: Any, inputs: Inputs) -> Grid:
    _, frames, _, height, width = inputs["hidden_states"].shape
    p, p_t = config.patch_size, config.patch_size_t or 1
    return Grid(-(-frames // p_t), height // p, width // p, inputs["encoder_hidden_states"].shape[1])


def _hunyuan(config: Any, inputs: Inputs) -> Grid:
    frames, height, width = inputs["hidden_states"].shape[2:]
    p, p_t = config.patch_size, config.patch_size_t
    text = inputs["encoder_hidden_states"].shape[1]
    return Grid(frames // p_t, height // p, width // p, text, text_first=False)


def _ltx(config: Any, inputs: Inputs) -> Grid | None:
    sizes = [inputs.get(name) for name in ("num_frames", "height", "width")]  # its tokens come patched
    return None if None in sizes else Grid(*map(int, sizes))  # type: ignore[arg-type]


def _image(config: Any, inputs: Inputs) -> Grid:
    height, width = inputs["hidden_states"].shape[2:]
    return Grid(1, height // config.patch_size, width // config.patch_size)


def _flux(config: Any, inputs: Inputs) -> Grid:
    ids: Tensor = inputs["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    frames, height, width = (ids[-1] - ids[0] + 1).long().tolist()  # waits for the device once per forward pass
    return Grid(frames, height, width, inputs["encoder_hidden_states"].shape[1])


GRIDS: dict[str, Callable[[Any, Inputs], Grid | None]] = {
    "WanTransformer3DModel": _wan,
    "CogVideoXTransformer3DModel": _cogvideox,
    "HunyuanVideoTransformer3DModel": _hunyuan,
    "LTXVideoTransformer3DModel": _ltx,
    "PixArtTransformer2DModel": _image,
    "DiTTransformer2DModel": _image,
    "FluxTransformer2DModel": _flux,
}
TEXT = ("HunyuanVideoTokenRefiner",)  # its self-attentions run over text


def _reader(module: nn.Module) -> Callable[[Any, Inputs], Grid | None] | None:
    """What reads the grid of this module's class or of one that it derives from."""
    return next((GRIDS[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in GRIDS), None)


# -- hooks ----------------------------------------------------------------------------------------------------


def _enter(module: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    reader = _reader(module)
    if reader is not None:
        given = dict(zip(_names(type(module)), args, strict=False)) | keywords
        _current.set(reader(module.config, given))
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    if getattr(module, "gradient_checkpointing", False) and not isinstance(checkpoint, _Repeating):
        module._gradient_checkpointing_func = _Repeating(checkpoint)


def _leave(module: Any, args: tuple[Any, ...], output: Any) -> None:
    _current.set(None)


@constant
def _names(cls: type[nn.Module]) -> tuple[str, ...]:
    """The arguments of a model's forward, in their order."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


@contextmanager
def _entered(grid: Grid | None) -> Iterator[None]:
    token = _current.set(grid)
    try:
        yield
    finally:
        _current.reset(token)


@dataclass(frozen=True)
class _Repeating:
    """A model's checkpointing function whose recomputation re-enters grid and call: backward runs after both ended."""

    checkpoint: Any

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        if torch.compiler.is_compiling():  # compiled code repeats operators, not Python
            return self.checkpoint(function, *args)
        grid, call = current_grid(), current_call()

        def again(*args: Any) -> Any:
            if current_call() is call:
                inside: AbstractContextManager[None] = nullcontext()
            else:  # the generator's state is the checkpoint's to restore
                inside = enter(None if call is None else replace(call, seed=None))
            with _entered(grid), inside:
                return function(*args)

        return self.checkpoint(again, *args)
