"""Roles and the Networks that play them: builds, freezes, shares, averages; role name -> view."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffdistill.compiling import Compile, compile_network
from diffdistill.denoiser import Cond, Denoiser, Guidance
from diffdistill.errors import UserError
from diffdistill.networks.adapter import AdapterSpec, adapters_for
from diffdistill.networks.codec import PIXELS, Codec
from diffdistill.networks.discriminator import Heads, Scalar
from diffdistill.networks.ema import Constant, Ema, Rate
from diffdistill.networks.inputs import EmbeddingWithInputs
from diffdistill.networks.lora import LoraLayer, LoraSpec, adapt, merge
from diffdistill.onednn import by_onednn
from diffdistill.shards import placed

Build = Literal["denoiser", "heads", "scalar"]


class Spread(Protocol):
    """What `parallel` leaves with networks that several processes train."""

    @property
    def whole(self) -> bool: ...
    def sync_gradients(self, on: bool) -> None: ...
    def follow(self) -> None: ...
    def settle(self, weights: Sequence[Tensor]) -> None: ...
    def rest(self) -> None: ...


@dataclass(frozen=True)
class Role:
    """What a method asks of one of its networks.

    init: role whose weights it starts from; None for heads and scalars, which start fresh.
    trainable: an optimizer steps it.  writable: frozen, but a Transition writes it, so it has weights of its own.
    ema_of, ema: the weights are a moving average of that role's, at this rate per update.
    build: denoiser | heads (on features of role `reads`) | scalar (a function of time).
    layers: indices into blocks that heads read; empty means the middle one.
    inputs: extra scalar inputs (w, s, step); adapters read w without.  modes: legal values of `roles.<role>=`, among
    copy, lora and adapter, the default first.
    """

    init: str | None = "teacher"
    trainable: bool = True
    writable: bool = False
    ema_of: str | None = None
    ema: float | Rate | None = None
    build: Build = "denoiser"
    reads: str | None = None
    layers: tuple[int, ...] = ()
    inputs: tuple[str, ...] = ()
    modes: tuple[str, ...] = ("copy", "lora")

    @property
    def owns_weights(self) -> bool:
        return self.trainable or self.writable or self.ema_of is not None


class Networks:
    """The networks of one run. `networks[name]` is the view of a role: a Denoiser, Heads or a Scalar.

    teacher: the pretrained network (a module; frozen here).  roles: from the distiller's class.  modes: role -> copy,
    lora or adapter.  shape: [*sample] of what is denoised.  cond: an example condition with batch 1.  guidance: a scale
    and an optional interval for the views of teacher and target.  together: what views over one network ask at once is
    one call.  Look views up when they are used, not once: a Transition may change them.
    """

    def __init__(
        self,
        teacher: Any,
        roles: Mapping[str, Role],
        shape: tuple[int, ...],
        cond: Cond,
        modes: Mapping[str, str] | None = None,
        lora: LoraSpec | None = None,
        adapter: AdapterSpec | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        codec: Codec = PIXELS,
        together: bool = False,
    ) -> None:
        self.teacher, self.roles, self.shape, self.cond, self.codec = teacher, dict(roles), shape, cond, codec
        self.modes = self._check_modes(modes or {})
        self.together = together
        self.lora, self.adapter = lora or LoraSpec(), adapter or AdapterSpec()
        self._first: Tensor | None = None  # tensor of the teacher: where that lies, all lies
        self._views: dict[str, Any] = {}
        self._modules: dict[str, nn.Module] = {}
        self._averages: dict[str, Ema] = {}
        teacher.requires_grad_(False).eval()
        guidance = self._guidance(guidance_scale, guidance_interval)
        self._views["teacher"] = self._view(teacher, "teacher", guidance)
        # copies first: they must not carry the adapters of the roles that share the backbone
        for mode in ("copy", "lora", "adapter"):
            for name, role in self.roles.items():
                if role.build == "denoiser" and name != "teacher" and self.modes[name] == mode:
                    self._build_denoiser(name, role, guidance)
        for name, role in self.roles.items():
            if role.build == "heads":
                self._build_heads(name, role)
            elif role.build == "scalar":
                self._modules[name] = self._views[name] = Scalar().to(self._device)
                self._views[name].role = name
        self._weights = {name: list(module.parameters()) for name, module in self._modules.items()}
        for name, role in self.roles.items():
            if role.ema_of is not None:
                rate = role.ema if callable(role.ema) else Constant(0.0 if role.ema is None else role.ema)
                self._averages[name] = Ema(self.weights(role.ema_of), rate, self.weights(name))
        self._active = frozenset(self._modules)
        self._spread: Spread | None = None
        self.checkpointed = False  # blocks repeat their forward pass in the backward one
        self.train_only(())

    # -- views ------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Any:
        return self._views[name]

    def __contains__(self, name: str) -> bool:
        return name in self._views

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of the roles an optimizer steps."""
        return tuple(name for name, role in self.roles.items() if role.trainable and name != "teacher")

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def one_pass(self) -> bool:
        """Whether a call can give a derivative by forward mode and a gradient at once: neither torch's checkpointing
        nor FSDP2's hooks take part in that."""
        return not self.checkpointed and (self._spread is None or self._spread.whole)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of states: float64 for a float64 teacher, else float32 (frozen weights may be narrower)."""
        wide = any(p.dtype == torch.float64 for p in self.teacher.parameters())
        return torch.float64 if wide else torch.float32

    def weights(self, name: str) -> list[nn.Parameter]:
        """The parameters that belong to role `name` alone: all of a copy, the adapters and inputs in lora mode."""
        return self._weights[name]

    def named_weights(self, name: str) -> list[tuple[str, nn.Parameter]]:
        """As `weights`, with their names."""
        self.rest()
        return list(self._modules[name].named_parameters())

    def state(self, name: str) -> dict[str, Tensor]:
        """Role `name`'s own weights by name."""
        self.rest()
        return dict(self._modules[name].state_dict())

    def load(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Write role `name`'s own weights; names and shapes must match. Whole tensors do for sharded weights."""
        own = self.state(name)
        fitting = {key: placed(value, own[key]) if key in own else value for key, value in state.items()}
        self._modules[name].load_state_dict(fitting)

    @property
    def owned(self) -> tuple[str, ...]:
        """Names of the roles with weights of their own."""
        return tuple(self._modules)

    def module(self, name: str) -> nn.Module:
        """What holds role `name`'s own weights: a network, or its adapters."""
        return self._modules[name]

    def bare(self) -> Any:
        """A copy of the teacher's network without any role's adapters."""
        network = copy.deepcopy(self.teacher)
        for module in network.modules():
            module._forward_hooks.clear()
            module._forward_hooks_with_kwargs.clear()
        merge(network, "")
        return network

    def standalone(self, name: str) -> Any:
        """A copy of role `name`'s network with its adapter folded in and no other role's (for export)."""
        network = copy.deepcopy(self._views[name].network)
        merge(network, name)
        return network

    # -- training ---------------------------------------------------------------------------------------------

    def train_only(self, names: Sequence[str]) -> None:
        """requires_grad and dropout on exactly the weights of these roles."""
        for name in self._modules:
            if (name in names) == (name in self._active):
                continue  # walking the modules at every phase costs a tenth of a small step
            active = name in names
            for weight in self._weights[name]:
                weight.requires_grad_(active)
            if self.modes.get(name) != "lora":
                _set_training(self._modules[name], active)
        if self._spread is not None and frozenset(names) != self._active:
            self._spread.follow()
        self._active = frozenset(names)

    @property
    def training(self) -> tuple[str, ...]:
        """Names of the roles of the last `train_only`."""
        return tuple(name for name in self._modules if name in self._active)

    def spread(self, how: Spread) -> None:
        """The modules have been spread in place, before any optimizer or evaluation average was made."""
        assert not self.averages()
        self._spread, self._first = how, None
        self._weights = {name: list(module.parameters()) for name, module in self._modules.items()}
        for name, average in self._averages.items():
            average.over(self.weights(str(self.roles[name].ema_of)), self.weights(name))

    def sync_gradients(self, on: bool) -> None:
        """Whether the next backward pass averages gradients over processes; all but the last micro-batch's wait."""
        if self._spread is not None:
            self._spread.sync_gradients(on)

    def settle(self, names: Sequence[str]) -> None:
        """After the last backward pass of an update of these roles: their gradients are the mean over processes."""
        if self._spread is not None:
            self._spread.settle([weight for name in names for weight in self._weights[name]])

    def rest(self) -> None:
        """After calls, each process holds its part of the weights alone, as readers and optimizers expect them."""
        if self._spread is not None:
            self._spread.rest()

    def zero_grad(self) -> None:
        """Forget the gradients of the roles of the last `train_only`: others take none."""
        for name in self._active:
            for weight in self._weights[name]:
                weight.grad = None

    def update_ema(self, trained: Sequence[str]) -> None:
        """One update of every average whose source was just stepped."""
        for name, average in self._averages.items():
            source = self.roles[name].ema_of if name in self.roles else name.removeprefix("average/")
            if source in trained:
                average.update()

    def track(self, name: str, rate: Rate) -> None:
        """Keep an evaluation average of role `name`."""
        self._averages[f"average/{name}"] = Ema(self.weights(name), rate)

    def averages(self) -> dict[str, Ema]:
        """Evaluation averages by role name."""
        return {k.removeprefix("average/"): v for k, v in self._averages.items() if k.startswith("average/")}

    def counters(self) -> dict[str, Any]:
        """What changes in training beside weights: updates of each average, and views that lost their guidance."""
        plain = [name for name, view in self._views.items() if isinstance(view, Denoiser) and view.guidance is None]
        return {"updates": {name: average.updates for name, average in self._averages.items()}, "unguided": plain}

    def load_counters(self, saved: Mapping[str, Any]) -> None:
        """Inverse of `counters`; weights and averages are loaded on their own."""
        for name, updates in saved["updates"].items():
            self._averages[name].updates = updates
        for name in saved["unguided"]:
            self._views[name] = self._views[name].guided(None)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the context, roles with an evaluation average hold it."""
        self.rest()
        with ExitStack() as stack:
            for average in self.averages().values():
                stack.enter_context(average.swapped())
            stack.callback(self.rest)
            yield

    def lay_channels_last(self) -> None:
        """Weights of two-dimensional convolutions, and so what they compute, with channels innermost."""
        for module in self._modules_of_roles():
            module.to(memory_format=torch.channels_last)

    def multiply_by_onednn(self) -> None:
        """Linear layers on a CPU by oneDNN, see `diffdistill.onednn`."""
        for module in self._modules_of_roles():
            by_onednn(module)

    def _modules_of_roles(self) -> list[nn.Module]:
        """What computes the roles, and the teacher."""
        views = [self._views[name] for name in self.roles]
        return [*(view.network if isinstance(view, Denoiser) else view for view in views), self.teacher]

    def compile(self, compile: Compile = True) -> None:
        """torch.compile every network in place, once per distinct module. compile: true, or a mode of torch.compile."""
        networks: dict[int, Any] = {id(v.network): v.network for v in self._views.values() if isinstance(v, Denoiser)}
        for network in networks.values():
            compile_network(network, compile)

    def mean(self, x: Tensor) -> Tensor:
        """Mean over ranks, the only collective a method may call; identity on one process."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return x
        total = x.clone()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @torch.no_grad()
    def copy(self, source: str, target: str) -> None:
        """Write `source`'s own weights into `target`, a role of the same mode with weights of its own.

        The target then is that student: guidance, already inside the student, leaves its view.
        """
        if self.modes.get(source) != self.modes.get(target):
            raise UserError(
                f"roles.{target}",
                f"must be {self.modes[source]} like {source}, which is copied into it",
                self.modes[target],
                f"Set roles.{target}={self.modes[source]}.",
            )
        state = {key.replace(f".{source}.", f".{target}."): value for key, value in self.state(source).items()}
        self.load(target, state)
        if isinstance(self._views[target], Denoiser):
            self._views[target] = self._views[target].guided(None)

    def restart_averages(self, name: str) -> None:
        """Begin again every average of role `name`."""
        for key, average in self._averages.items():
            if key == f"average/{name}" or (key in self.roles and self.roles[key].ema_of == name):
                average.restart()

    # -- construction -----------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        if self._first is None:  # finding it takes longer than a draw
            self._first = next(itertools.chain(self.teacher.parameters(), self.teacher.buffers()), None)
        return torch.device("cpu") if self._first is None else self._first.device

    def _guidance(self, scale: float, interval: tuple[float, float] | None) -> Guidance | None:
        if scale == 1.0:
            return None
        if self.teacher.null is None:
            raise UserError(
                "guidance.scale", "needs a network with a null condition", scale, "Set guidance.scale=1 for this one."
            )
        null = {key: value.to(self._device) for key, value in self.teacher.null.items()}
        return Guidance(scale, null, interval)

    def _check_modes(self, modes: Mapping[str, str]) -> dict[str, str]:
        for name, mode in modes.items():
            if name not in self.roles:
                raise UserError(f"roles.{name}", f"must be one of {sorted(self.roles)}", mode, "Mend the role's name.")
            if mode not in self.roles[name].modes:
                legal = ", ".join(self.roles[name].modes)
                raise UserError(f"roles.{name}", f"must be one of: {legal}", mode, "This role is trained so or not.")
        chosen = {name: modes.get(name, role.modes[0]) for name, role in self.roles.items()}
        for name, role in self.roles.items():  # an average has the form of what it averages
            if role.ema_of is not None and chosen[name] != chosen[role.ema_of]:
                if name in modes:
                    source = chosen[role.ema_of]
                    fix = f"It is the average of {role.ema_of}; leave it out."
                    raise UserError(f"roles.{name}", f"must be {source} like {role.ema_of}", modes[name], fix)
                chosen[name] = chosen[role.ema_of]
        return chosen

    def _build_denoiser(self, name: str, role: Role, guidance: Guidance | None) -> None:
        if not role.owns_weights:
            # frozen and never written: the teacher under another name
            self._views[name] = self._view(self.teacher, name, guidance)
            return
        if self.teacher.closed_form:
            raise UserError(
                "networks", f"must be trainable, role {name} needs weights", "a closed-form network", "Use another one."
            )
        if self.modes[name] == "copy":
            source = self.teacher if role.init in (None, "teacher") else self._views[role.init].network
            network = copy.deepcopy(source)
            own: nn.Module = network
            _rename_inputs(network, str(role.init), name)
            if role.init in (None, "teacher"):
                _add_inputs(network, name, role.inputs)
        elif self.modes[name] == "adapter":
            network = self.teacher
            own = self._adapters(name)
        else:
            network = self.teacher
            own = nn.Module()
            for index, layer in enumerate(adapt(network, name, self.lora)):
                own.add_module(str(index), _RoleAdapter(layer, name))
            if (inputs := _add_inputs(network, name, role.inputs)) is not None:
                own.add_module("inputs", inputs)
        self._modules[name] = own
        written_target = guidance if role.writable and name.startswith("target") else None
        self._views[name] = self._view(network, name, written_target)

    def _view(self, network: Any, name: str, guidance: Guidance | None) -> Denoiser:
        return Denoiser(network, name, together=self.together).guided(guidance)

    def _adapters(self, name: str) -> nn.Module:
        """New adapters of role `name`, at work on the teacher's backbone for its calls alone."""
        backbone = getattr(self.teacher, "backbone", None)
        if backbone is None:
            fix = f"Set roles.{name}=copy."
            raise UserError(f"roles.{name}", "needs a network of modules", type(self.teacher).__name__, fix)
        probe = Denoiser(self.teacher, "probe")
        x, t, cond = self._example(probe)
        blocks = [name for name, module in backbone.named_modules() if module in list(self.teacher.blocks)]
        adapters = adapters_for(backbone, self.adapter, lambda: probe(x, t, cond), blocks).to(self._device)
        adapters.hang(backbone, adapters.for_role(name))
        return adapters

    def _example(self, view: Denoiser) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """A state at t_max, its time and condition, batch 1: what shapes are read off."""
        network: Any = view.network
        weight = next(network.parameters())
        x = torch.zeros(1, *self.shape, device=weight.device, dtype=weight.dtype)
        t = torch.full((1,), view.process.t_max, device=weight.device)
        return x, t, {key: value.to(weight.device) for key, value in self.cond.items()}

    @torch.no_grad()
    def _build_heads(self, name: str, role: Role) -> None:
        view: Denoiser = self._views[role.reads or "teacher"]
        layers = role.layers or (len(view.network.blocks) // 2,)
        x, t, cond = self._example(view)
        cond |= {name: torch.zeros_like(t) for name in self.roles[role.reads or "teacher"].inputs if role.reads}
        try:
            found = view.features(x, t, cond, layers)
        except UserError as error:  # a method's hyperparameter of that name
            raise UserError("distiller.layers", error.constraint, error.value, error.fix) from error
        heads = Heads({layer: feature.shape[1:] for layer, feature in zip(layers, found, strict=True)})
        heads.role = name
        self._modules[name] = self._views[name] = heads.to(x.device)


def _set_training(module: nn.Module, active: bool) -> None:
    """As `module.train(active)`, which modules with a way of their own are asked for, without torch's __setattr__."""
    todo = [module]
    while todo:
        inner = todo.pop()
        if type(inner).train is not nn.Module.train:
            inner.train(active)
            continue
        inner.__dict__["training"] = active
        todo += [below for below in inner._modules.values() if below is not None]


class _RoleAdapter(nn.Module):
    """One role's part of a LoraLayer, so that a role's weights are a module of their own."""

    def __init__(self, layer: LoraLayer, role: str) -> None:
        super().__init__()
        self.down, self.up = layer.down[role], layer.up[role]


def _add_inputs(network: Any, name: str, inputs: tuple[str, ...]) -> nn.Module | None:
    """Embeddings of role `name`'s extra inputs beside the time embedding; None where nothing is to be added."""
    if not inputs or network.embedding_name == "":  # it reads them off the call
        return None
    if network.embedding_name is None:
        constraint = f"must embed time in one place, to which {', '.join(inputs)} of role {name} can be added"
        raise UserError("networks", constraint, type(network).__name__, "Choose another method or network.")
    added: nn.Module = _with_inputs(network).add(name, inputs, network.embedding_width)
    return added


def _with_inputs(network: Any) -> EmbeddingWithInputs:
    """The network's time embedding, wrapped in place once."""
    *path, leaf = network.embedding_name.split(".")
    parent = network.get_submodule(".".join(path))
    embedding = getattr(parent, leaf)
    if not isinstance(embedding, EmbeddingWithInputs):
        embedding = EmbeddingWithInputs(embedding)
        setattr(parent, leaf, embedding)
    return embedding


def _rename_inputs(network: Any, source: str, name: str) -> None:
    """The extra inputs that a copy took over from role `source` now belong to `name`."""
    for module in network.modules():
        if isinstance(module, EmbeddingWithInputs) and source in module.roles:
            module.roles[name] = module.roles.pop(source)
