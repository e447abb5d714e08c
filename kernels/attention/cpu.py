"""The `cpu` backend: block-sparse attention in C++ through ctypes, forward and backward, for float32 and bfloat16."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffdistill.errors import UserError
from diffdistill.kernels.attention import build

VARIANTS = ("avx512_bf16", "avx512", "avx2")  # best first, as the library numbers them
CHOICE = "DIFFDISTILL_CPU_KERNEL"  # environment variable that names one
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
MAX_WIDTH = 256
REFUSED = {  # what the library answers: argument, constraint, fix
    2: (
        "q, k, v",
        "must have 1 to 2^31 rows and heads, widths of 1 to 256, Hq a multiple of Hkv",
        "Change the shapes.",
    ),
    3: ("q, k, v", "must have memory", "Give tensors with data."),
    4: ("layout.block_q, layout.block_k", "must be 64 or 128", "Change the layout."),
    5: ("layout.kv_num", "must lie in [0, width of kv_idx]", "Build the layout again."),
    6: ("layout.kv_idx", "must ascend within [0, number of key blocks) in the first kv_num entries", "Sort it."),
    7: ("layout.kv_valid", "must lie in [0, block_k]", "Count the valid keys of each block."),
    8: ("layout", "must have batch and heads of 1 or of q, lists no longer than there are blocks", "Build it for q."),
    9: (CHOICE, "must name a kernel that this processor runs", "Unset it."),
}


class Rows(ctypes.Structure):
    """native/attention.h's Rows: of a tensor [B, H, S, width] its memory, and its strides in elements."""

    _fields_ = [("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("row", c_int64)]


class _Call(ctypes.Structure):
    """native/attention.h's Call, field by field."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "heads", "kv_heads", "q_len", "kv_len", "width", "v_width")),
        *((name, Rows) for name in ("q", "k", "v", "o", "d_o", "d_q", "d_k", "d_v")),
        *((name, c_void_p) for name in ("lse", "d_lse", "bias")),
        *((name, c_int64) for name in ("bias_batch", "bias_head")),
        *((name, c_void_p) for name in ("kv_num", "kv_idx", "kv_valid")),
        *((name, c_int64) for name in ("block_q", "block_k", "list_batch", "list_heads", "list_max")),
        *((name, c_int32) for name in ("dtype", "variant", "threads")),
        ("scale", c_float),
    ]


def available() -> bool:
    """Whether the kernel can run here; the first call may compile it, which takes seconds."""
    return why_not() is None


def why_not() -> str | None:
    """Why the kernel cannot run here: no compiler, or a processor without AVX2. None if it can."""
    found = _loaded()
    if isinstance(found, str):
        return found
    return None if _runnable(found) else "this processor has neither AVX2 nor AVX-512"


def variant() -> str:
    """The instruction set in use: the best that the processor has, or the one that DIFFDISTILL_CPU_KERNEL names.

    Raises UserError if the kernel cannot run, or not with the named one.
    """
    names = _runnable(library())
    chosen = os.environ.get(CHOICE) or names[0]
    if chosen not in names:
        raise UserError(CHOICE, f"must be one of {names} on this processor", chosen, "Unset it for the first.")
    return chosen


def supports(q: Tensor, v: Tensor) -> str | None:
    """Why these cannot be given to `forward`, None if they can. q: [B, Hq, Sq, D], v: [B, Hkv, Skv, Dv]."""
    if q.device.type != "cpu":
        return f"tensors must be on the CPU, not {q.device}"
    if q.dtype not in DTYPES:
        return f"dtype must be float32 or bfloat16, not {q.dtype}"
    for name, width in (("D", q.shape[-1]), ("Dv", v.shape[-1])):
        if not 1 <= width <= MAX_WIDTH:
            return f"{name} must lie in 1 to {MAX_WIDTH}, not {width}"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: Any, scale: float, key_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the blocks that `layout` lists.

    q: [B, Hq, Sq, D], k: [B, Hkv, Skv, D], v: [B, Hkv, Skv, Dv], one dtype, float32 or bfloat16; unit last stride, else
    they are copied. layout: a BlockLayout. scale: multiplies the logits, in float32. key_bias: [B|1, Hq|1, Skv]
    float32, added to the logits. Returns o [B, Hq, Sq, Dv] in q's dtype and lse [B, Hq, Sq] float32, natural
    logarithm. A query without keys: o = 0, lse = -inf. Raises UserError naming the argument that does not fit.
    """
    o = q.new_empty(*q.shape[:3], v.shape[-1])
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    if o.numel():
        call = _Arguments(q, k, v, layout, scale, key_bias)
        call.rows(o=o)
        call.run("forward", lse=lse)
    return o, lse


def backward(
    d_o: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    layout: Any,
    scale: float,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` with respect to q, k and v, in their dtype, summed in float32.

    d_o: [B, Hq, Sq, Dv], d_lse: [B, Hq, Sq] or None: gradients with respect to o and lse; o, lse: what `forward`
    returned. The result does not depend on the number of threads, to the bit. Raises UserError as `forward`.
    """
    # the library writes every element; filling them here would leave torch's threads spinning beside its own
    new = torch.empty_like if o.numel() else torch.zeros_like
    grads = {name: new(x, memory_format=torch.contiguous_format) for name, x in zip("qkv", (q, k, v), strict=True)}
    if o.numel():
        call = _Arguments(q, k, v, layout, scale, key_bias)
        shape = (*q.shape[:3], v.shape[-1])
        _require_shape(shape, o=o, d_o=d_o)
        call.rows(o=o.to(q.dtype), d_o=d_o.to(q.dtype), d_q=grads["q"], d_k=grads["k"], d_v=grads["v"])
        call.run("backward", lse=lse, d_lse=d_lse)
    return grads["q"], grads["k"], grads["v"]


class _Arguments:
    """One call: its struct, and the tensors that the struct points into."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, layout: Any, scale: float, key_bias: Tensor | None) -> None:
        _check(q, k, v, layout)
        self.kept: list[Tensor] = []
        self.shape = q.shape
        self.call = _Call(batch=q.shape[0], heads=q.shape[1], kv_heads=k.shape[1], q_len=q.shape[2], kv_len=k.shape[2])
        self.call.width, self.call.v_width = q.shape[3], v.shape[3]
        self.call.dtype, self.call.scale = DTYPES[q.dtype], scale
        self.call.variant = VARIANTS.index(variant())
        self.call.threads = torch.get_num_threads()
        self.rows(q=q, k=k, v=v)
        self._lists(layout)
        if key_bias is not None:
            self._bias(key_bias)

    def rows(self, **tensors: Tensor) -> None:
        """Point the struct at tensors [B, H, S, width]; those whose last stride is not 1 are copied."""
        for name, x in tensors.items():
            if x.stride(3) != 1 and x.shape[3] > 1:
                x = x.contiguous()
            setattr(self.call, name, Rows(self._pointer(x), x.stride(0), x.stride(1), x.stride(2)))

    def run(self, function: str, lse: Tensor, d_lse: Tensor | None = None) -> None:
        """Call the library's `function`. Raises UserError, or MemoryError."""
        _require_shape(self.shape[:3], lse=lse)
        self.call.lse = self._pointer(lse if function == "forward" else lse.float().contiguous())
        if d_lse is not None:
            _require_shape(self.shape[:3], d_lse=d_lse)
            self.call.d_lse = self._pointer(d_lse.float().contiguous())
        succeeded(getattr(library(), f"attention_{function}")(ctypes.byref(self.call)), f"attention's {function} pass")

    def _lists(self, layout: Any) -> None:
        for name in ("kv_num", "kv_idx", "kv_valid"):
            x = getattr(layout, name)
            setattr(self.call, name, None if x is None else self._pointer(x.contiguous()))
        self.call.block_q, self.call.block_k = layout.block_q, layout.block_k
        self.call.list_batch, self.call.list_heads, _, self.call.list_max = layout.kv_idx.shape

    def _bias(self, bias: Tensor) -> None:
        batch, heads, length = self.call.batch, self.call.heads, self.call.kv_len
        if (
            bias.ndim != 3
            or bias.shape[0] not in (1, batch)
            or bias.shape[1] not in (1, heads)
            or bias.shape[2] != length
        ):
            wanted = f"must be [1 or {batch}, 1 or {heads}, {length}]"
            raise UserError("key_bias", wanted, tuple(bias.shape), "Give one value per key.")
        bias = bias.float().contiguous()
        self.call.bias = self._pointer(bias)
        self.call.bias_batch = bias.stride(0) if bias.shape[0] > 1 else 0
        self.call.bias_head = bias.stride(1) if bias.shape[1] > 1 else 0

    def _pointer(self, x: Tensor) -> int:
        self.kept.append(x)
        return x.data_ptr()


def _check(q: Tensor, k: Tensor, v: Tensor, layout: Any) -> None:
    """Refuse what the library cannot see: shapes that do not fit together, other dtypes, lists of another size."""
    if reason := supports(q, v):
        raise UserError("q, k, v", "must suit the cpu kernel", reason, "Choose another backend.")
    if k.dtype != q.dtype or v.dtype != q.dtype or k.device != q.device or v.device != q.device:
        raise UserError("k, v", f"must be {q.dtype} on {q.device} like q", (k.dtype, v.dtype), "Convert them.")
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise UserError("q, k, v", "must be [B, H, S, D]", (q.ndim, k.ndim, v.ndim), "Give four axes.")
    _require_shape((q.shape[0], k.shape[1], k.shape[2], q.shape[3]), k=k)
    _require_shape((*k.shape[:3], v.shape[3]), v=v)
    _check_lists(layout, q.shape[2], k.shape[2])


def _check_lists(layout: Any, q_len: int, kv_len: int) -> None:
    if (layout.q_len, layout.kv_len) != (q_len, kv_len):
        given = (layout.q_len, layout.kv_len)
        raise UserError("layout", f"must be for lengths {(q_len, kv_len)}", given, "Build it for q and k.")
    for name in ("block_q", "block_k"):
        if getattr(layout, name) not in (64, 128):
            raise UserError(f"layout.{name}", "must be 64 or 128", getattr(layout, name), "Change the layout.")
    num_q, num_k = -(-q_len // layout.block_q), -(-kv_len // layout.block_k)
    lists = (*layout.kv_num.shape[:2], num_q)
    wanted = {"kv_num": lists, "kv_idx": (*lists, layout.kv_idx.shape[-1]), "kv_valid": (num_k,)}
    for name, shape in wanted.items():
        x = getattr(layout, name)
        if x is None and name == "kv_valid":
            continue
        if tuple(x.shape) != shape or x.dtype != torch.int32 or x.device.type != "cpu":
            found = (tuple(x.shape), x.dtype, str(x.device))
            raise UserError(f"layout.{name}", f"must be int32 {shape} on the CPU", found, "Build the layout again.")


def _require_shape(shape: tuple[int, ...], **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if tuple(x.shape) != tuple(shape):
            raise UserError(name, f"must have shape {tuple(shape)}", tuple(x.shape), "Match the others.")


def succeeded(status: int, what: str) -> None:
    """Raise what the library's answer means, unless it is 0: UserError or MemoryError."""
    if status == 1:
        raise MemoryError(f"{what} found no memory for its working copies")
    if status:
        key, constraint, fix = REFUSED[status]
        raise UserError(key, constraint, "another value", fix)


def _runnable(library: ctypes.CDLL) -> list[str]:
    return [name for i, name in enumerate(VARIANTS) if library.attention_runs(i)]


def library() -> ctypes.CDLL:
    """The loaded library. Raises UserError if there is none."""
    found = _loaded()
    if isinstance(found, str):
        raise UserError("backend", "must be one that runs here", f"cpu, but {found}", "Choose another backend.")
    return found


@cache
def _loaded() -> ctypes.CDLL | str:
    """The library: the installed one, the cached one, or one compiled now. Else why there is none."""
    for path in (*Path(__file__).parent.glob("_native*.so"), build.cached_library()):
        if path.exists() and (library := _open(path)) is not None:
            return library
    try:
        build.build(build.cached_library())
    except (build.CannotBuildError, OSError) as error:
        return str(error)
    return _open(build.cached_library()) or f"{build.cached_library()} does not load"


def _open(path: Path) -> ctypes.CDLL | None:
    """The library at `path`, if it loads and was built from the present sources."""
    try:
        library = ctypes.CDLL(str(path))
        library.attention_source_hash.restype = c_char_p
        if library.attention_source_hash().decode() != build.source_hash():
            return None
    except (OSError, AttributeError):
        return None
    for name in ("attention_forward", "attention_backward"):
        getattr(library, name).argtypes = [POINTER(_Call)]
        getattr(library, name).restype = c_int32
    library.attention_runs.argtypes, library.attention_runs.restype = [c_int32], c_int32
    library.attention_call_size.restype = c_int64
    assert library.attention_call_size() == ctypes.sizeof(_Call)
    library.attention_register_rate.argtypes = [c_int32, c_int32, c_double]
    library.attention_register_rate.restype = c_double
    library.attention_read_rate.argtypes = [c_int32, c_void_p, c_int64]
    library.attention_read_rate.restype = c_double
    return library
