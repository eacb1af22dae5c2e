"""Parts of the examples on mixtures of experts: compiled steps train as eager ones do, and losses fall."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import plait
import pytest
import torch

from tests.runtime.ranks import on_ranks

FOLDER = str(Path(__file__).parent.parent / "examples" / "moe")


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    sys.path.insert(0, FOLDER)
    import gpt2_moe

    yield gpt2_moe
    sys.path.remove(FOLDER)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def losses(example: Any, gate: str, compiled: bool, steps: int) -> list[float]:
    from train_gpt2_moe import EagerStep

    text = example.Text(example.sentences(200))
    config = example.Config(len(text.characters), width=16, heads=2, layers=2, context=16, hidden=32, gate=gate)
    torch.manual_seed(0)
    model = example.GPT2MoE(config)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    step = plait.train_step(model, example.loss, optimizer) if compiled else EagerStep(model, optimizer, 1)
    return [step(*text.batch(8, 16, seed)).item() for seed in range(steps)]


@pytest.mark.parametrize("gate", plait.moe.GATES)
def test_compiled_steps_train_as_eager_ones_do(example: ModuleType, gate: str) -> None:
    eager, compiled = (losses(example, gate, how, 4) for how in (False, True))
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=0)


@pytest.mark.parametrize("gate", plait.moe.GATES)
def test_losses_fall_below_what_frequencies_of_characters_give(example: ModuleType, gate: str) -> None:
    text = example.Text(example.sentences(200))
    share = text.tokens.bincount() / len(text.tokens)
    found = losses(example, gate, False, 120)
    assert sum(found[-5:]) / 5 < -(share * share.log()).sum().item() - 0.5, found


def test_made_up_text_is_the_same_each_time_and_its_sums_are_right(example: ModuleType) -> None:
    text = example.sentences(100)
    assert text == example.sentences(100)
    sums = [line for line in text.splitlines() if line[0].isdigit()]
    assert len(sums) > 20
    for line in sums:
        a, _, b, _, c = line.rstrip(".").split()
        assert int(a) + int(b) == int(c)


def trained_on_a_rank(rank: int, size: int) -> dict[str, tuple[list[float], dict[str, int]]]:
    """Losses of a rank in full precision, and how often each rule of the overlap passes fired, by way of training."""
    sys.path.insert(0, FOLDER)
    import gpt2_moe
    from train_gpt2_moe import EagerStep, passes

    group, found = torch.distributed.group.WORLD, {}
    text = gpt2_moe.Text(gpt2_moe.sentences(200))
    config = gpt2_moe.Config(len(text.characters), width=16, heads=2, layers=2, context=16, hidden=32, gate="top2")
    for how, pieces in (("eager", 0), ("none", 0), ("both", 2)):
        torch.manual_seed(0)
        model = gpt2_moe.GPT2MoE(config, group)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        step: Any = EagerStep(model, optimizer, size)
        if how != "eager":
            step = plait.train_step(model, gpt2_moe.loss, optimizer, group, passes=passes(how, pieces))
        losses = [step(*text.batch(8, 16, seed * size + rank)).item() for seed in range(3)]
        fired = {} if how == "eager" else {rule: n for s in step.compiled.history for rule, n in s.fired.items()}
        found[how] = losses, {rule: fired[rule] for rule in ("chunks", "beside") if rule in fired}
    return found


@pytest.mark.slow
def test_pieces_change_no_bit_of_training_on_two_ranks() -> None:
    ranks = on_ranks(trained_on_a_rank, 2, timeout=240)
    for found in ranks:
        (eager, _), (whole, nothing), (pieces, fired) = found["eager"], found["none"], found["both"]
        assert nothing == {} and fired["chunks"] == 1 and fired["beside"] > 0
        assert pieces == whole
        torch.testing.assert_close(whole, eager, rtol=1e-4, atol=0)
    assert ranks[0]["none"][0] != ranks[1]["none"][0], "ranks have batches of their own"
