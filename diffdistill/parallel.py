"""Training over several processes: the group they form, the mesh, and every role spread alike: sharded by FSDP2, or
left whole on each process.

The only file that knows FSDP2 (`torch.distributed.fsdp.fully_shard`). A sharded role's weights become DTensors, which
`shards` reads and places; a network gathers the weights of one block when it is called, and gradients are averaged over
all processes where they are stored. Replicas stay as they are, and their gradients are averaged together after the
backward pass. What a method computes does not change.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from diffdistill.denoiser import Denoiser
from diffdistill.errors import UserError, require_at_least, require_positive
from diffdistill.networks.adapter import Adapters
from diffdistill.networks.roles import Networks

MeshKind = Literal["shard", "hybrid", "replicate"]
# Gloo's threads live as long as a mesh does, and meshes stay in caches of DTensor. One that still wants to let go of a
# tensor when the interpreter has begun to end aborts the process (SIGABRT, "terminate called without an active
# exception"); while this thread sleeps it gets its turn.
_LAST_WORDS = 0.1  # seconds
_BUCKET = 2**26  # bytes: large enough that latency does not show, small beside the weights
_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # beside WORLD_SIZE, from whoever starts several


def num_processes() -> int:
    """How many torchrun or accelerate launch started, before they have met."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Parallel:
    """mesh: shard spreads weights, gradients, optimizers and averages over all processes; hybrid over groups of
    `shard_size`, of which each holds everything; replicate leaves everything on each.  reshard_after_forward: whether
    a block is let go of after its forward pass, and gathered again by the backward one; else a network stays gathered
    from its first call to the update.  backend: of the collectives, null is nccl where there is a GPU, else gloo.
    timeout: seconds that a process waits for the others.

    One process needs none of it, whatever is asked.
    """

    mesh: MeshKind = "shard"
    shard_size: int | None = None
    reshard_after_forward: bool = True
    backend: Literal["gloo", "nccl"] | None = None
    timeout: float = 1800.0

    def __post_init__(self) -> None:
        require_positive(timeout=self.timeout)
        if self.shard_size is not None:
            require_at_least(1, shard_size=self.shard_size)
        if self.mesh == "hybrid" and self.shard_size is None:
            fix = "Set it to the processes of one machine."
            raise UserError("shard_size", "must be given for mesh=hybrid", "null", fix)
        if self.mesh != "hybrid" and self.shard_size is not None:
            fix = "Leave it out, or set mesh=hybrid."
            raise UserError("shard_size", f"must be null for mesh={self.mesh}", self.shard_size, fix)

    def check(self, size: int) -> None:
        """Refuse what `size` processes on this machine cannot do."""
        if size == 1:
            return
        if self.shard_size is not None and size % self.shard_size:
            constraint = f"must divide the {size} processes"
            raise UserError("parallel.shard_size", constraint, self.shard_size, "Choose a divisor.")
        if missing := [name for name in _NEEDED if name not in os.environ]:
            fix = "Start with torchrun or accelerate launch, or unset WORLD_SIZE."
            raise UserError("WORLD_SIZE", f"must come with {', '.join(missing)}", size, fix)
        if not hasattr(_fsdp().FSDPModule, "reset_iter_state"):
            fix = "Upgrade torch, or start one process."
            raise UserError(
                "torch", "must have FSDPModule.reset_iter_state for several processes", torch.__version__, fix
            )
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if self.backend == "nccl" and not devices:
            raise UserError("parallel.backend", "must be gloo or null without a GPU", "nccl", "Leave it out.")
        if self.backend == "gloo" and devices:
            fix = "Leave it out, or hide the GPUs: CUDA_VISIBLE_DEVICES= ."
            raise UserError("parallel.backend", "must be nccl or null where there are GPUs", "gloo", fix)
        if devices and (local := int(os.environ["LOCAL_RANK"])) >= devices:
            fix = f"Start {devices} on this machine."
            raise UserError("WORLD_SIZE", f"must not be more than the {devices} GPUs of a machine", local + 1, fix)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within, the processes that were started together can talk; only the main one prints. One needs no group."""
        size = num_processes()
        self.check(size)
        dist: Any = torch.distributed
        if size == 1 or dist.is_initialized():
            yield
            return
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        limit = timedelta(seconds=self.timeout)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=limit)
        try:
            yield
        finally:
            dist.destroy_process_group()
            time.sleep(_LAST_WORDS)

    @property
    def sharded(self) -> bool:
        """Whether a process holds parts of weights."""
        return self.mesh != "replicate"

    def spread(self, networks: Networks) -> None:
        """Spread every role over the processes of the group, in place."""
        if self.sharded:
            shard(networks, self._device_mesh(), self.reshard_after_forward)
        else:
            networks.spread(Replicas())

    def _device_mesh(self) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        size = torch.distributed.get_world_size()
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        if self.shard_size is None:
            return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
        return init_device_mesh(kind, (size // self.shard_size, self.shard_size), mesh_dim_names=("replicate", "shard"))


class Replicas:
    """Networks that are whole on every process.

    FSDP2 does this too, on a mesh of one column, but gathers copies of what is there already, and reduces block by
    block; DDP's reducer does not know of phases that train some adapters of a shared backbone.
    """

    whole = True  # on each process

    def sync_gradients(self, on: bool) -> None:
        """Nothing: sums of several backward passes are averaged once, by `settle`."""

    def follow(self) -> None:
        """Nothing: there are no copies of weights."""

    def rest(self) -> None:
        """Nothing: weights are always whole."""

    def settle(self, weights: Sequence[Tensor]) -> None:
        """Average the gradients over all processes, in a few large messages; every process has as many."""
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            torch.distributed.all_reduce(flat)
            flat /= torch.distributed.get_world_size()
            parts = flat.split([gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [part.view_as(own) for part, own in zip(parts, bucket, strict=True)])


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one dtype each, in order, up to `_BUCKET` bytes together."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and (gradient.dtype != bucket[0].dtype or size + gradient.nbytes > _BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        yield bucket


class Sharding:
    """What `shard` made of networks: the modules that were sharded as one."""

    whole = False

    def __init__(self, roots: Sequence[Any]) -> None:
        self.roots = list(roots)
        sharded = _fsdp().FSDPModule
        modules = [module for root in self.roots for module in root.modules() if isinstance(module, sharded)]
        # no public way leads to the gathered copies; walking all modules at every phase would cost more than a look
        groups = [group for module in modules for group in module._get_fsdp_state()._fsdp_param_groups]
        self._weights = [weight for group in groups for weight in group.fsdp_params]
        self._called: list[Any] = []  # since the last rest
        for root in self.roots:
            root.register_forward_pre_hook(self._note, prepend=True)

    def _note(self, root: Any, inputs: Any) -> None:
        if root not in self._called:
            self._called.append(root)

    def sync_gradients(self, on: bool) -> None:
        """Whether the next backward pass averages gradients over processes, or keeps them for a later one."""
        for root in self.roots:
            root.set_requires_gradient_sync(on)

    def follow(self) -> None:
        """Gathered weights of earlier calls take the requires_grad of their parts, as FSDP2 does at the next call: by
        then a function transform may be under way (`torch.func.jvp`), which forbids it."""
        for weight in self._weights:
            if hasattr(weight, "_unsharded_param"):
                weight._unsharded_param.requires_grad_(weight.sharded_param.requires_grad)

    def settle(self, weights: Sequence[Tensor]) -> None:
        """After the last backward pass of an update, which has averaged the gradients: back to parts alone."""
        self.rest()

    def rest(self) -> None:
        """Back to parts alone, after a backward pass that synchronised, or calls without one.

        A call that ended at a recorded block (`Denoiser.features`) leaves a network's outer weights gathered, and any
        call all of them with reshard_after_forward=false.
        """
        for root in self._called:
            root.reset_iter_state()
        self._called.clear()


def shard(networks: Networks, mesh: Any, reshard_after_forward: bool = True) -> None:
    """Shard every role over the mesh, in place: each network by its blocks, heads, scalars and adapters as one."""
    fully_shard = _fsdp().fully_shard
    roots = []
    for root, blocks in _modules(networks):
        for module in (*blocks, root):
            fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward)
        for block in blocks:
            block.register_forward_hook(_gathering(root))
        roots.append(root)
    networks.spread(Sharding(roots))


def _gathering(root: Any) -> Any:
    """A hook on a block: before its backward pass the network's outer weights are gathered too.

    A call that ended at a recorded block never reaches the network's own hook for that.
    """

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda gradient: root.unshard())

    return hook


def _modules(networks: Networks) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Every module that is called on its own, and the blocks in it."""
    seen: set[int] = set()
    for name in ("teacher", *networks.roles):
        view = networks[name]
        if isinstance(view, Denoiser):
            network: Any = view.network
            blocks = [block for block in network.blocks if block is not None]
            called = [(network, blocks)]
            if name in networks.owned and isinstance(adapters := networks.module(name), Adapters):
                called += [(site, []) for site in adapters.sites.values()]  # hooks call each
        else:
            called = [(view, [])]
        for module, inner in called:
            if id(module) not in seen and any(True for _ in module.parameters()):
                seen.add(id(module))
                yield module, [block for block in inner if any(True for _ in block.parameters())]


def _fsdp() -> Any:
    import torch.distributed.fsdp as fsdp  # takes a while

    return fsdp
