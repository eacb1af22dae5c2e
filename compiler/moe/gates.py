"""Gates: which experts each token chooses, with which weight, and in which order tokens claim places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor


class Routing(NamedTuple):
    """What a gate decides for S tokens.

    choice [S, k] int64: experts in order of preference, all different; -1 is none. weight [S, k]: what an expert's result is
    multiplied with, whether or not other choices of the token are dropped. Places are claimed by the pairs (token, choice)
    of the tokens in `order` (a permutation [S]; None: as they come), with `by_choice` first all first choices, then all
    second ones.
    """

    choice: Tensor
    weight: Tensor
    order: Tensor | None = None
    by_choice: bool = False

    @property
    def whole(self) -> bool:
        """Whether a token's place depends on tokens behind it, so that the whole batch must be seen first."""
        return self.order is not None or self.by_choice


class GateLike(Protocol):
    """Any function of this form is a gate."""

    @property
    def choices(self) -> int:
        """k, experts of a token."""
        ...

    def __call__(self, probabilities: Tensor) -> Routing:
        """probabilities [S, E] of each token's experts."""
        ...


@dataclass(frozen=True)
class Gate:
    """The `choices` most probable experts of each token, weighted by their probabilities.

    `normalised`: weights of a token sum to one. `order` says who claims places first: "tokens", as they come, with all
    their choices; "choices", all first choices, then all second ones (GShard); "importance", as "choices", but tokens
    whose largest probability is higher come before others (batch-prioritised routing, V-MoE), equal ones as they come.
    """

    choices: int = 1
    order: Literal["tokens", "choices", "importance"] = "tokens"
    normalised: bool = False

    def __call__(self, probabilities: Tensor) -> Routing:
        weight, choice = torch.topk(probabilities, self.choices, dim=-1)
        order = None
        if self.order == "importance":
            order = torch.sort(weight[:, 0].detach(), stable=True, descending=True).indices
        if self.normalised:
            weight = weight / weight.sum(-1, keepdim=True)
        return Routing(choice, weight, order, self.order != "tokens" and self.choices > 1)


GATES: dict[str, Gate] = {
    "switch": Gate(),
    "top2": Gate(2, normalised=True),
    "top2-by-choice": Gate(2, "choices", normalised=True),
    "batch-prioritised": Gate(order="importance"),
}
"""Gates by name: Switch Transformer's, both orders of top-2, and batch-prioritised top-1."""


def balance_loss(probabilities: Tensor, choice: Tensor) -> Tensor:
    """E times the sum over experts of (their share of all choices) * (their mean probability): 1 in balance, E at worst.

    Choices count before any is dropped. Switch Transformer, equation 4; gradients go through the probabilities alone.
    """
    experts = probabilities.shape[-1]
    chosen = choice.unsqueeze(-1) == torch.arange(experts, device=choice.device)
    share = chosen.to(probabilities.dtype).mean((0, 1))
    return experts * (share * probabilities.mean(0)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """The mean of squared log-sum-exps of the logits [S, E], which keeps them small. ST-MoE, equation 5."""
    return torch.logsumexp(logits, -1).square().mean()
