"""Hugging Face models with sparse mixtures of experts: their experts computed by plait's ops, spread over ranks."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...errors import UnknownExperts
from .gates import Routing
from .layer import Capacity, mix
from .placement import Group, LocalExperts, Placement

_ACTIVATIONS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
}  # transformers' and torch's modules, by what they compute
_FORM = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True, "has_post_expert_norm": False}
_ops = cast(Any, torch.ops.plait)


class StackedExperts(LocalExperts):
    """In the place of a model's experts: same call, same names, this rank's part of the weights.

    Parameters: `gate_up_proj` [L, 2 * hidden, width] and `down_proj` [L, width, hidden].
    """

    gate_up_proj: Tensor
    down_proj: Tensor

    def __init__(self, experts: nn.Module, activation: str, placement: Placement, capacity_factor: float | None) -> None:
        super().__init__(placement)
        self.activation, self.capacity_factor = activation, capacity_factor
        Capacity(capacity_factor, 1, placement.experts)  # refuses a bad factor now
        for name in ("gate_up_proj", "down_proj"):
            whole = getattr(experts, name)
            part = whole if placement.ranks == 1 else whole.detach()[placement.own].clone()
            self.hold(name, nn.Parameter(part, whole.requires_grad) if part is not whole else whole)
        self.train(experts.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [S, width] to the experts [S, k] that the model's gate chose, weighted by [S, k]: [S, width].

        Tokens claim places as they come.
        """
        capacity = Capacity(self.capacity_factor, top_k_index.shape[1], self.placement.experts)
        routing = Routing(top_k_index, top_k_weights)
        return mix(hidden_states, routing, self._compute, self.placement, capacity(hidden_states.shape[0]))

    def _compute(self, buffer: Tensor, rows: Tensor) -> Tensor:
        gate, up = (w.transpose(1, 2) for w in self.gate_up_proj.chunk(2, 1))
        hidden = _ops.expert_act(
            _ops.expert_mm(buffer, gate, rows), None, _ops.expert_mm(buffer, up, rows), rows, self.activation
        )
        return _ops.expert_mm(hidden, self.down_proj.transpose(1, 2), rows)


def rewrite(model: nn.Module, group: Group | None = None, capacity_factor: float | None = None) -> nn.Module:
    """Replace the experts of a Hugging Face model by plait's ops, in place, and spread them over the ranks of a group.

    Gates stay the model's own. Without a capacity factor nothing is dropped and the model computes what it did; with one,
    each expert has ceil(capacity_factor * k * S / E) places for the S tokens of a rank. All ranks call it with the same
    model; each keeps its part of the experts, and everything else whole. The forms known are those whose experts compute
    what MixtralExperts does (Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, …), as transformers 5 holds them: in stacked tensors.

    Gives the model. Raises UnknownExperts, UnevenExperts and BadMixture; the model is as it was then.
    """
    found = {name: m for name, m in model.named_modules(remove_duplicate=False) if _mixes(name, m)}
    if not found:
        raise UnknownExperts(cls=type(model).__name__, why="no module in it is, or is called, experts")
    made: dict[int, StackedExperts] = {}
    for name, module in found.items():
        why = _why_unknown(module)
        if why is not None:
            raise UnknownExperts(cls=f"{type(module).__name__} ({name})", why=why)
        if id(module) not in made:
            placement = Placement.of(cast(Any, module).gate_up_proj.shape[0], group)
            activation = _ACTIVATIONS[type(module.act_fn).__name__]
            made[id(module)] = StackedExperts(module, activation, placement, capacity_factor)
    for name, module in found.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made[id(module)])
    return model


def _mixes(name: str, module: nn.Module) -> bool:
    return name.rpartition(".")[2] == "experts" or type(module).__name__.endswith("Experts")


def _why_unknown(module: Any) -> str | None:
    """Why experts are not of the form that is known; None where they are."""
    if not type(module).__module__.startswith("transformers."):
        return "only classes of transformers are known"
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    known: Any = MixtralExperts
    if _code(type(module)) != _code(known) or module._apply_gate.__func__ is not known._apply_gate:
        return "it does not compute what MixtralExperts of the installed transformers does"
    for flag, value in _FORM.items():
        if getattr(module, flag, value) != value:
            return f"{flag} is {getattr(module, flag)}"
    if module._is_expert_parallel:
        return "its experts are spread over ranks already"
    if type(module.act_fn).__name__ not in _ACTIVATIONS:
        return f"its activation is {type(module.act_fn).__name__}"
    return None


def _code(cls: type) -> tuple[Any, ...]:
    """What a class's own forward does, behind decorators."""
    code = inspect.unwrap(cast(Any, cls).forward).__code__
    return code.co_code, code.co_names, code.co_consts, code.co_varnames
