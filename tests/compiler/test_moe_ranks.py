"""Mixtures of experts on two ranks compute what one rank computes of each rank's batch, bit for bit.

Gradients of experts sum over the batches of both ranks; they are equal where sums are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from plait.compiler.moe import GATES, MoE, Routing, gather_state_dict, rewrite, split_state_dict
from torch import Tensor

from tests.runtime.ranks import on_ranks

EXPERTS, TOKENS, WIDTH = 6, 40, 8


@dataclass(frozen=True)
class Exact:
    """The two most probable experts with weights 1 and 1/2, so that all sums of integers are exact."""

    choices: int = 2

    def __call__(self, probabilities: Tensor) -> Routing:
        choice = probabilities.topk(2).indices
        return Routing(choice, torch.tensor([1.0, 0.5]).expand(len(choice), 2))


CASES: dict[str, tuple[Any, float | None]] = {
    "exact": (Exact(), 0.75),
    "exact-all": (Exact(), None),
    **{name: (name, 0.75) for name in GATES},
    "switch-all": ("switch", None),
    "floats": ("top2", 1.0),
}


def made(case: str, group: Any = None) -> MoE:
    """A layer with integer weights in its experts, but for "floats".

    Feature 0 draws tokens to experts 0 and 4, and away from expert 2.
    """
    gate, factor = CASES[case]
    torch.manual_seed(0)
    layer = MoE(WIDTH, 12, EXPERTS, gate, factor, group, activation="relu" if case != "floats" else "gelu")
    with torch.no_grad():
        for name, parameter in layer.experts.named_parameters():
            if case != "floats":
                parameter.copy_((parameter * (12 if name != "down" else 16)).round())
        layer.router.weight[:, 0] = torch.tensor([0.5, 0, -50, 0, 1, 0])
    return layer


def batch(rank: int, lopsided: bool) -> Tensor:
    generator = torch.Generator().manual_seed(10 + rank)
    x = torch.randint(-3, 4, (TOKENS, WIDTH), generator=generator).float()
    x[:, 0] = (200 if rank else -200) if lopsided else 1  # all of rank 1 want experts 4 and 0, all of rank 0 want expert 2
    return x


def computed(layer: MoE, x: Tensor) -> dict[str, np.ndarray]:
    """The result of a layer and its gradients, by name."""
    x = x.clone().requires_grad_()
    y = layer(x)
    layer.zero_grad()
    weights = torch.randint(-2, 3, y.shape, generator=torch.Generator().manual_seed(3)).float()
    (y * weights).sum().backward()
    found = {"y": y, "x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}}
    return {n: t.detach().numpy() for n, t in found.items() if t is not None}


def on_one_of_two(rank: int, size: int) -> dict[str, Any]:
    """What one rank finds of everything that is tested here."""
    group = torch.distributed.group.WORLD
    found: dict[str, Any] = {}
    for case in CASES:
        layer = made(case, group)
        for lopsided in (False, True):
            found[case, lopsided] = computed(layer, batch(rank, lopsided))
    layer = made("exact", group)
    found["whole"] = {n: t.numpy() for n, t in gather_state_dict(layer).items()}
    torch.manual_seed(5 + rank)
    other = MoE(WIDTH, 12, EXPERTS, Exact(), 0.75, group, activation="relu")
    other.load_state_dict(split_state_dict(other, gather_state_dict(layer)))
    found["loaded"] = computed(other, batch(rank, False))
    found["mixtral"] = _mixtral(rank, group)
    return found


def tiny_mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def sentence(rank: int) -> Tensor:
    return torch.randint(32, (2, 12), generator=torch.Generator().manual_seed(rank))


def _mixtral(rank: int, group: Any) -> dict[str, Any] | None:
    try:
        import transformers  # noqa: F401
    except ImportError:
        return None
    model = tiny_mixtral()
    whole = {n: t.clone() for n, t in model.state_dict().items()}
    rewrite(model, group)
    x = sentence(rank)
    out = model(x, labels=x)
    out.loss.backward()
    gathered = gather_state_dict(model)
    return {
        "logits": out.logits.detach().numpy(),
        "gradients": {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None},
        "experts": model.model.layers[0].mlp.experts.gate_up_proj.shape[0],
        "same": gathered.keys() == whole.keys() and all(torch.equal(gathered[n], whole[n]) for n in whole),
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return on_ranks(on_one_of_two, 2)


@pytest.mark.parametrize("lopsided", [False, True], ids=["even", "lopsided"])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_compute_what_one_does(ranks: list[dict[str, Any]], case: str, lopsided: bool) -> None:
    layer = made(case)
    alone = [computed(layer, batch(r, lopsided)) for r in range(2)]
    assert not np.array_equal(alone[0]["y"], alone[1]["y"])
    half = EXPERTS // 2
    for r in range(2):
        found = ranks[r][case, lopsided]
        assert found.keys() == alone[r].keys()
        for name, value in found.items():
            if not name.startswith("experts."):
                np.testing.assert_array_equal(value, alone[r][name], err_msg=f"{name} on rank {r}")
                continue
            both = (alone[0][name] + alone[1][name])[r * half : (r + 1) * half]
            if case.startswith("exact"):
                np.testing.assert_array_equal(value, both, err_msg=f"{name} on rank {r}")
            else:
                np.testing.assert_allclose(value, both, rtol=1e-5, atol=1e-5 * np.abs(both).max(), err_msg=f"{name}")


def test_integer_sums_are_tested_where_tokens_are_dropped_and_experts_empty() -> None:
    """The comparison above says something only if it covers such loads."""
    for lopsided in (False, True):
        rows = [computed(made("exact"), batch(r, lopsided)) for r in range(2)]
        for found in rows:
            assert not found["experts.up"][2].any() or lopsided
            assert np.array_equal(2 * found["y"], np.round(2 * found["y"])), "outputs are halves of integers"
            assert max(np.abs(value).max() for value in found.values()) < 2**22
        dropped = [int((found["x"] == 0).all(1).sum()) for found in rows]
        assert sum(dropped) > 0, dropped
    wanted = [computed(made("exact"), batch(r, True))["experts.up"].any((1, 2)).tolist() for r in range(2)]
    assert wanted[0][2] and wanted[1] == [True, False, False, False, True, False]


def test_a_seed_gives_the_same_model_on_any_number_of_ranks(ranks: list[dict[str, Any]]) -> None:
    alone = made("exact").state_dict()
    for r in range(2):
        whole = ranks[r]["whole"]
        assert whole.keys() == alone.keys()
        for name, value in whole.items():
            np.testing.assert_array_equal(value, alone[name].numpy(), err_msg=name)


def test_a_whole_state_dict_is_split_over_ranks(ranks: list[dict[str, Any]]) -> None:
    for r in range(2):
        for name, value in ranks[r]["exact", False].items():
            np.testing.assert_array_equal(ranks[r]["loaded"][name], value, err_msg=name)


def test_mixtral_over_two_ranks_computes_what_it_did(ranks: list[dict[str, Any]]) -> None:
    pytest.importorskip("transformers")
    model = tiny_mixtral()
    gradients: list[dict[str, np.ndarray]] = []
    for r in range(2):
        model.zero_grad()
        out = model(sentence(r), labels=sentence(r))
        out.loss.backward()
        np.testing.assert_allclose(ranks[r]["mixtral"]["logits"], out.logits.detach().numpy(), rtol=1e-4, atol=1e-5)
        gradients.append({n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None})
    for r in range(2):
        found = ranks[r]["mixtral"]
        assert found["experts"] == 2 and found["same"]
        assert found["gradients"].keys() == gradients[r].keys()
        for name, value in found["gradients"].items():
            local = ".experts." in name
            wanted = (gradients[0][name] + gradients[1][name])[2 * r : 2 * r + 2] if local else gradients[r][name]
            np.testing.assert_allclose(value, wanted, rtol=1e-3, atol=1e-5, err_msg=name)
