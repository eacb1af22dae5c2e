"""`plait.torch_stages`: compiled stages under the schedules of `torch.distributed.pipelining`."""

import pytest
import torch
from plait import stage_loss, torch_stages
from torch.distributed.pipelining import schedules

from tests.compiler.stage_models import batches, loss, model
from tests.runtime.ranks import on_ranks


def gradients(rank, size, name):
    kind = getattr(schedules, name)
    several = issubclass(kind, schedules.PipelineScheduleMulti)
    count = 2 * size if several else size
    x, tokens, y = batches(1)[0]
    m = model()
    part = {"x": x[:2], "tokens": tokens[:2], "y": y[:2]}
    indices = [rank, count - 1 - rank] if name == "ScheduleZBVZeroBubble" else None
    stages = torch_stages(m, loss, part, count, indices=indices)
    schedule = kind(stages if several else stages[0], n_microbatches=4, loss_fn=stage_loss)
    losses = []
    schedule.step(x=x, tokens=tokens, y=y, target=torch.zeros(8), losses=losses)
    return {n: p.grad for n, p in m.named_parameters() if p.grad is not None}, [float(v) for v in losses]


@pytest.mark.parametrize("name", ["Schedule1F1B", "ScheduleInterleavedZeroBubble", "ScheduleZBVZeroBubble"])
def test_gradients_are_those_of_eager(name):
    m = model()
    batch = batches(1)[0]
    loss(m, *batch).backward()
    want = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
    parts = [float(loss(m, *part).detach()) for part in zip(*(t.chunk(4) for t in batch), strict=True)]
    found = on_ranks(gradients, 2, name, timeout=200)
    got = {n: g for mine, _ in found for n, g in mine.items()}
    assert got.keys() == want.keys()
    for n, g in want.items():
        torch.testing.assert_close(got[n], g, rtol=1e-4, atol=1e-6)
    assert [v for _, losses in found for v in losses] == pytest.approx(parts, rel=1e-5)
