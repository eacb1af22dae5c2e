"""`plait.staged_step` on ranks: the losses of one process; every rank that is left says what happened."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from plait import staged_step
from plait.errors import StageLost, StageTimedOut

from tests.compiler.stage_models import batches, loss, model, sgd
from tests.runtime.ranks import Ranks, on_ranks

CASES = (("1f1b", None, True), ("zero-bubble", None, True), ("gpipe", None, False))


def trained(rank, size, cases):
    found = []
    for schedule, stages, fill in cases:
        m = model(dropout=0.1, noise=True)
        step = staged_step(
            m, loss, sgd(m), dist.group.WORLD, microbatches=4, schedule=schedule, stages=stages, fill=fill, seed=3
        )
        losses = [float(v) for v in step.over(batches(5))]
        step.synchronise()
        found.append((losses, torch.cat([p.detach().flatten() for p in m.parameters()])))
    return found


def alone():
    m = model(dropout=0.1, noise=True)
    step = staged_step(m, loss, sgd(m), microbatches=4, stages=2, seed=3)
    return [float(v) for v in step.over(batches(5))], torch.cat([p.detach().flatten() for p in m.parameters()])


@pytest.mark.parametrize("size", [2, 4])
def test_losses_and_parameters_are_those_of_one_process(size):
    losses, parameters = alone()
    for mine in on_ranks(trained, size, CASES if size == 2 else CASES[:1], timeout=240):
        for got, theirs in mine:
            assert got == losses and torch.equal(theirs, parameters)


def failing(rank, size, how):
    os.environ["PLAIT_COLLECTIVE_TIMEOUT_S"] = "4"
    m = model()

    def mine(m, x, tokens, y):
        return loss(m, x, tokens, y)

    step = staged_step(m, mine, sgd(m), dist.group.WORLD, microbatches=4, seed=1)
    (batch,) = batches(1)
    step(*batch)
    started = time.monotonic()
    if rank == 1 and how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and how == "late":
        time.sleep(12)
    try:
        step(*(t[:4] for t in batch)) if rank == 1 and how == "shape" else step(*batch)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return "nothing", "", 0.0


@pytest.mark.parametrize(
    ("how", "error"), [("killed", StageLost.__name__), ("shape", StageLost.__name__), ("late", StageTimedOut.__name__)]
)
def test_the_rank_that_is_left_says_what_it_waits_for(how, error):
    with Ranks(failing, 2, how) as ranks:
        name, text, seconds = ranks.result(0, 120)
        assert name == error and "rank 1" in text and "micro-batch" in text and seconds < 10
        if how == "shape":
            assert ranks.result(1, 60)[0] == "BatchChanged"
