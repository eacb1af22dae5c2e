"""`plait.staged_step` in one process: the same bits whatever the stages, the schedule and the filling; errors."""

import copy

import pytest
import torch
from plait import staged_step
from plait.cost.microbatches import Schedule, bidirectional, one_f_one_b
from plait.errors import BadSchedule, BatchChanged, CannotStage, LossIsNoScalar, NothingToTrain
from torch import nn
from torch.nn import functional as F

from tests.compiler.stage_models import batches, loss, model, sgd


def run(m, steps=4, **options):
    step = staged_step(m, loss, sgd(m), **{"microbatches": 4, **options})
    return [float(value) for value in step.over(batches(steps))], step


def parameters(m):
    return torch.cat([p.detach().flatten() for p in m.parameters()])


@pytest.fixture(scope="module")
def plain():
    m = model()
    losses, _ = run(m, stages=1, fill=False)
    return losses, parameters(m)


@pytest.mark.parametrize(
    ("schedule", "stages", "fill"),
    [("1f1b", 2, True), ("gpipe", 3, False), ("zero-bubble", 2, True), ("interleaved", 4, True)],
)
def test_every_cut_and_schedule_gives_the_same_bits(plain, schedule, stages, fill):
    m = model()
    losses, step = run(m, schedule=schedule, stages=stages, fill=fill)
    assert losses == plain[0] and torch.equal(parameters(m), plain[1])
    assert f"{stages} stages" in repr(step) and "frozen layers" in str(step)


def test_as_eager_with_gradients_accumulated(plain):
    m = model()
    optimizer, losses = sgd(m), []
    for batch in batches(4):
        optimizer.zero_grad()
        parts = [loss(m, *part) / 4 for part in zip(*(t.chunk(4) for t in batch), strict=True)]
        for part in parts:
            part.backward()
        optimizer.step()
        losses.append(float(sum(p.detach() for p in parts)))
    assert losses == pytest.approx(plain[0], rel=1e-6)
    torch.testing.assert_close(parameters(m), plain[1], rtol=1e-5, atol=1e-6)


def test_dropout_and_noise_follow_from_the_seed_alone():
    made = [run(model(dropout=0.2, noise=True), seed=3, stages=n, schedule=s, fill=f)[0]
            for n, s, f in ((1, "1f1b", False), (2, "1f1b", True), (3, "gpipe", True))]  # fmt: skip
    assert made[0] == made[1] == made[2]
    assert run(model(dropout=0.2, noise=True), seed=4, stages=2)[0] != made[0]


def test_random_state_outside_of_steps_is_left_alone():
    m = model(dropout=0.2)
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    run(m, steps=2, stages=2, seed=1)
    assert torch.equal(torch.rand(3), want)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, stride=2)])
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x):
        skip = F.silu(self.norm(self.down[0](x)))
        h = F.silu(self.down[1](skip))
        return self.up(torch.cat([F.interpolate(h, scale_factor=2.0), skip], 1))


def test_a_unet_with_statistics():
    torch.manual_seed(0)
    first = Normed()
    x = torch.randn(4, 3, 8, 8)
    made = []
    for stages in (1, 2):
        m = copy.deepcopy(first)
        step = staged_step(m, lambda m, x: F.mse_loss(m(x), x), sgd(m), microbatches=2, stages=stages)
        made.append(([float(step(x)) for _ in range(2)], m.norm.running_mean.clone(), int(m.norm.num_batches_tracked)))
    assert made[0][0] == made[1][0] and torch.equal(made[0][1], made[1][1]) and made[0][2] == made[1][2] == 4
    m = copy.deepcopy(first)
    total = sum(F.mse_loss(m(part), part) / 2 for part in x.chunk(2))
    assert float(total) == pytest.approx(made[0][0][0], rel=1e-5)


def test_what_does_not_fit_the_first_batch_is_an_error():
    m = model()
    step = staged_step(m, loss, sgd(m), microbatches=4, stages=2)
    (batch, other) = batches(2)
    with pytest.raises(BatchChanged, match="7 rows cannot be cut into 4"):
        step(*(t[:7] for t in batch))
    with pytest.raises(BatchChanged, match="equally many rows"):
        step(batch[0], batch[1][:4], batch[2])
    step(*batch)
    with pytest.raises(BatchChanged, match=r"leaf 0 of this batch is float32\[4, 5, 8\].* and was float32\[8, 5, 8\]"):
        step(*(t[:4] for t in batch))
    m.eval()
    with pytest.raises(BatchChanged, match="switched between training and evaluation"):
        step(*batch)
    m.train()
    step(*batch, ahead=other)
    with pytest.raises(BatchChanged, match="not the one that was announced"):
        step(*batch)


def test_schedules_that_cannot_be_run():
    m = model()
    with pytest.raises(BadSchedule, match="is none of gpipe"):
        staged_step(m, loss, sgd(m), schedule="fifo")
    with pytest.raises(BadSchedule, match="for 8 micro-batches, and 4"):
        staged_step(m, loss, sgd(m), schedule=one_f_one_b(2, 8))
    with pytest.raises(BadSchedule, match="can be planned, not run"):
        staged_step(m, loss, sgd(m), schedule=bidirectional(2, 4))
    with pytest.raises(BadSchedule, match="2 stages, and 3 were asked for"):
        staged_step(m, loss, sgd(m), schedule=one_f_one_b(2, 4), stages=3)


def test_a_schedule_from_a_file(plain, tmp_path):
    one_f_one_b(2, 4).write(tmp_path / "s.csv")
    losses, _ = run(model(), schedule=Schedule.read(tmp_path / "s.csv"))
    assert losses == plain[0]


def test_models_that_cannot_be_cut():
    x = torch.randn(4, 3)

    def first(fn, stages=2, **options):
        m = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
        return staged_step(m, fn, sgd(m), microbatches=2, stages=stages, **options)(x)

    with pytest.raises(CannotStage, match="stages were asked for"):
        first(lambda m, x: m(x).mean(), stages=40)
    with pytest.raises(CannotStage, match=r"no trained module 'blocks.9'"):
        first(lambda m, x: m(x).mean(), stages=None, begin=["blocks.9"])
    with pytest.raises(LossIsNoScalar):
        first(lambda m, x: m(x))
    with pytest.raises(NothingToTrain):
        first(lambda m, x: x.mean())
    with pytest.raises(CannotStage):
        first(lambda m, x: m(x).mean() if m(x).sum() > 0 else m(x).sum())
