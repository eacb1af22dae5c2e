"""Models of transformers with their experts rewritten: they compute what they did, and unknown forms are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from plait.compiler.moe import StackedExperts, rewrite
from plait.errors import BadMixture, UnknownExperts
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

COMMON: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
MANY: dict[str, Any] = {**COMMON, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral-gelu": ("Mixtral", {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "hidden_act": "gelu_new"}),
    "qwen2-moe": ("Qwen2Moe", {**MANY, "shared_expert_intermediate_size": 20}),
    "qwen3-moe": ("Qwen3Moe", {**MANY, "head_dim": 8, "norm_topk_prob": True}),
    "granite": ("GraniteMoe", {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("Olmoe", {**COMMON, "num_experts": 6, "num_experts_per_tok": 3}),
}


def tiny(name: str) -> Any:
    family, arguments = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**arguments))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def tokens() -> Tensor:
    return torch.randint(32, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_a_rewritten_model_computes_what_it_did(name: str) -> None:
    model, x = tiny(name), tokens()
    expected = model(x, labels=x)
    expected.loss.backward()
    wanted = {n: p.grad for n, p in model.named_parameters()}
    other = copy.deepcopy(model)
    other.zero_grad()
    assert rewrite(other) is other
    kinds = [type(m) for n, m in other.named_modules() if n.endswith(".experts")]
    assert kinds == [StackedExperts] * 2
    found = other(x, labels=x)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    found.loss.backward()
    assert {n for n, _ in other.named_parameters()} == set(wanted)
    for n, p in other.named_parameters():
        torch.testing.assert_close(p.grad, wanted[n], rtol=1e-3, atol=1e-5, msg=lambda m, n=n: f"{n}: {m}")
        assert getattr(p, "plait_local", False) == (".experts." in n)


def test_a_capacity_drops_tokens_behind_the_last_place() -> None:
    model, x = tiny("mixtral"), tokens()
    generous, tight = rewrite(copy.deepcopy(model), capacity_factor=2.0), rewrite(copy.deepcopy(model), capacity_factor=0.5)
    wanted = model(x).logits
    torch.testing.assert_close(generous(x).logits, wanted, rtol=1e-4, atol=1e-5)  # 4 experts, 2 choices: places for all
    assert not torch.allclose(tight(x).logits, wanted, atol=1e-3)
    block, original = tight.model.layers[0].mlp, model.model.layers[0].mlp
    h = torch.randn(1, 40, 16)
    _, weight, choice = original.gate(h.view(40, 16))
    expected, capacity, taken = torch.zeros(40, 16), 10, [0] * 4  # 0.5 * 2 * 40 / 4
    for s in range(40):
        for e, w in zip(choice[s].tolist(), weight[s], strict=True):
            if taken[e] < capacity:
                gate, up = (original.experts.gate_up_proj[e] @ h[0, s]).chunk(2)
                expected[s] += w * (original.experts.down_proj[e] @ (original.experts.act_fn(gate) * up))
            taken[e] += 1
    torch.testing.assert_close(block(h)[0], expected, rtol=1e-4, atol=1e-5)
    assert max(taken) > capacity


def test_router_logits_and_jitter_stay_the_models_own() -> None:
    model, x = tiny("mixtral"), tokens()
    other = rewrite(copy.deepcopy(model))
    found, wanted = (m(x, labels=x, output_router_logits=True) for m in (other, model))
    assert len(found.router_logits) == 2
    torch.testing.assert_close(found.aux_loss, wanted.aux_loss)
    for m in (model, other):
        m.train()
        for layer in m.model.layers:
            layer.mlp.jitter_noise = 0.3
    results = []
    for m in (other, model):
        torch.manual_seed(2)
        results.append(m(x).logits)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_frozen_experts_stay_frozen_and_shared_ones_shared() -> None:
    model = tiny("mixtral")
    model.model.layers[0].mlp.experts.gate_up_proj.requires_grad_(False)
    model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts
    rewrite(model)
    first, second = (layer.mlp.experts for layer in model.model.layers)
    assert first is second and not first.gate_up_proj.requires_grad and first.down_proj.requires_grad and not first.training


class MixtralExperts(nn.Module):
    """Somebody else's, of the same name."""


def test_unknown_forms_are_refused_by_name() -> None:
    dense = transformers.LlamaConfig(**COMMON)
    oss = transformers.GptOssConfig(**COMMON, head_dim=8, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0)
    squared = tiny("mixtral")
    squared.model.layers[1].mlp.experts.act_fn = nn.Mish()
    for model, words in (
        (transformers.LlamaForCausalLM(dense), "LlamaForCausalLM cannot be rewritten: no module in it is, or is called"),
        (transformers.GptOssForCausalLM(oss), r"GptOssExperts \(model.layers.0.mlp.experts\)"),
        (squared, r"MixtralExperts \(model.layers.1.mlp.experts\) cannot be rewritten: its activation is Mish"),
        (nn.ModuleDict({"moe": MixtralExperts()}), r"MixtralExperts \(moe\).*only classes of transformers"),
    ):
        before = [type(m) for m in model.modules()]
        with pytest.raises(UnknownExperts, match=words):
            rewrite(model)
        assert before == [type(m) for m in model.modules()]


def test_bad_capacity_is_refused_before_anything_changes() -> None:
    model = tiny("mixtral")
    with pytest.raises(BadMixture, match="capacity_factor"):
        rewrite(model, capacity_factor=-1.0)
    assert not any(isinstance(m, StackedExperts) for m in model.modules())
