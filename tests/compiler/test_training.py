"""Compiled training steps against loops in eager."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import plait
import pytest
import torch
from plait import errors
from torch import nn

from tests.compiler.training_models import MODELS, OPTIMIZERS, classes, eager_step, mlp, vectors

STEPS = 10


def far(mine: nn.Module, theirs: nn.Module) -> dict[str, float]:
    """The largest difference of each parameter and buffer."""
    ours, others = mine.state_dict(), theirs.state_dict()
    assert ours.keys() == others.keys()
    return {name: (ours[name].double() - others[name].double()).abs().max().item() for name in ours}


def both(
    model: nn.Module, loss: Any, optimizer: str, batches: list[Any], **how: Any
) -> tuple[nn.Module, nn.Module, list[float], Any]:
    """The model after compiled steps and after eager ones, the differences of their losses, and the step."""
    theirs = copy.deepcopy(model)
    step = plait.train_step(model, loss, OPTIMIZERS[optimizer](model.parameters()), **how)
    other = OPTIMIZERS[optimizer](theirs.parameters())
    differences: list[float] = []
    for number, batch in enumerate(batches):
        torch.manual_seed(number)
        value = step(*batch)
        torch.manual_seed(number)
        differences.append(abs(value.item() - eager_step(theirs, loss, other, batch).item()))
    return model, theirs, differences, step


def same_gradients(mine: nn.Module, theirs: nn.Module, limit: float) -> None:
    for (name, p), q in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            assert (p.grad - q.grad).abs().max() <= limit, name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_ten_steps_are_those_of_eager(name: str, optimizer: str) -> None:
    make, loss, batch = MODELS[name]
    torch.manual_seed(0)
    mine, theirs, losses, step = both(make().double(), loss, optimizer, [batch() for _ in range(STEPS)])
    assert max(losses) < 1e-12
    assert max(far(mine, theirs).values()) < 1e-12, far(mine, theirs)
    assert len(step.variants) == 1 and step.compiled.record.runs == STEPS


@pytest.mark.parametrize("name", ["mlp", "conv", "gpt"])
def test_ten_steps_in_float32_are_close(name: str) -> None:
    make, loss, batch = MODELS[name]
    torch.manual_seed(0)
    mine, theirs, losses, _ = both(make(), loss, "sgd", [batch(torch.float32) for _ in range(STEPS)])
    assert max(losses) < 1e-5
    assert max(far(mine, theirs).values()) < 1e-5, far(mine, theirs)


class Partial(nn.Module):
    """A frozen layer, one that the loss does not reach, a buffer that is replaced and one that is added to."""

    seen: torch.Tensor
    total: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.unused = nn.Linear(12, 8), nn.Linear(8, 5), nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("total", torch.zeros(8))
        self.first.requires_grad_(False)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        self.seen = self.seen + x.shape[0]
        self.total.add_(x.detach().sum(0))
        self.calls += 1
        self.penalty = x.square().mean()
        return self.last(x)


def penalised(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return classes(model, x, y) + 0.1 * model.penalty + 0.1 * model.last.weight.square().sum()


def test_frozen_and_unused_parameters_have_no_gradient_and_state_is_kept() -> None:
    torch.manual_seed(0)
    model = Partial().double()
    model.unused.weight.grad = torch.ones_like(model.unused.weight)  # of an earlier step
    mine, theirs, losses, step = both(model, penalised, "adamw", [vectors() for _ in range(5)])
    assert max(losses) < 1e-12 and max(far(mine, theirs).values()) < 1e-12
    same_gradients(mine, theirs, 1e-12)
    assert model.unused.weight.grad is None and model.first.weight.grad is None and model.last.weight.grad is not None
    assert step.compiled.parameters == ("last.weight", "last.bias")
    assert model.seen == 40 and (model.penalty - theirs.penalty).abs() < 1e-12 and not model.penalty.requires_grad


class Shared(nn.Module):
    """Gradients that are one value twice, one number for all elements, a part of another one, and another parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.whole, self.part = (nn.Parameter(torch.rand(n)) for n in (6, 6, 6, 4))
        self.left, self.right, self.flat = (nn.Parameter(torch.rand(5)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = ((self.a + self.b) * x).sum()
        cut = ((self.whole + nn.functional.pad(self.part, (1, 1))) * x * x).sum()
        return both + cut + (self.left * self.right).sum() + self.flat.sum()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_gradient_has_memory_of_its_own(optimizer: str) -> None:
    torch.manual_seed(0)
    model = Shared().double()
    mine, theirs, losses, _ = both(
        model, lambda m, x: m(x), optimizer, [(torch.rand(6, dtype=torch.float64),) for _ in range(3)]
    )
    assert max(losses) < 1e-12 and max(far(mine, theirs).values()) < 1e-12
    same_gradients(mine, theirs, 1e-12)
    expected = [p.grad + 1 for p in model.parameters() if p.grad is not None]
    for p in model.parameters():
        assert p.grad is not None
        p.grad.add_(1)
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True) if p.grad is not None)


def test_batches_nest_and_losses_may_close_over_tensors() -> None:
    torch.manual_seed(0)
    weight = torch.rand(5, dtype=torch.float64)

    def loss(model: nn.Module, batch: dict[str, Any], scale: float) -> torch.Tensor:
        return scale * nn.functional.cross_entropy(model(batch["x"]), batch["more"][0], weight=weight)

    batches = [({"x": x, "more": (y, None)}, 0.5) for x, y in (vectors() for _ in range(3))]
    mine, theirs, losses, _ = both(mlp().double(), loss, "sgd", batches)
    assert max(losses) < 1e-12 and max(far(mine, theirs).values()) < 1e-12
    weight *= 2  # what is closed over is read at each call
    _, _, losses, _ = both(mlp().double(), loss, "sgd", batches)
    assert max(losses) < 1e-12


def test_another_signature_is_compiled_for_itself() -> None:
    torch.manual_seed(0)
    model = mlp(0.5).double()
    theirs = copy.deepcopy(model)
    optimizers = [OPTIMIZERS["sgd"](m.parameters()) for m in (model, theirs)]
    step = plait.train_step(model, classes, optimizers[0])

    def check(count: int, variants: int) -> None:
        batch = vectors(count=count)
        torch.manual_seed(count)
        value = step(*batch)
        torch.manual_seed(count)
        assert abs(value.item() - eager_step(theirs, classes, optimizers[1], batch).item()) < 1e-12
        same_gradients(model, theirs, 1e-12)
        assert len(step.variants) == variants

    check(8, 1)
    check(3, 2)
    check(8, 2)
    for m in (model, theirs):
        m.eval()  # no dropout
    check(8, 3)
    for m in (model, theirs):
        m.get_submodule("0").requires_grad_(False)
        m.zero_grad()
    check(8, 4)
    assert max(far(model, theirs).values()) < 1e-12


def test_activations_lie_in_the_arena() -> None:
    model = mlp()
    step = plait.train_step(model, classes, OPTIMIZERS["sgd"](model.parameters()))
    step(*vectors(torch.float32, 256))
    plan = step.compiled.compiled.plan
    fresh = {s.id for s in plan.values if s.storage == "fresh"}
    returned = {o.ref for o in plan.outputs}
    views = {s.ref for s in plan.values if s.storage == "view" and s.id in returned}
    assert fresh <= returned | views  # nothing is allocated in a call but what it returns
    assert isinstance(plan.arena, int) and plan.arena >= 256 * 24 * 4
    assert sum(s.storage == "arena" for s in plan.values) >= 3


def test_a_step_shows_what_it_is(tmp_path: Path) -> None:
    model = mlp()
    with plait.observe() as seen:
        step = plait.train_step(model, classes, OPTIMIZERS["sgd"](model.parameters()), options={"verify": "each-pass"})
        step(*vectors(torch.float32))
    assert [r.kind for r in seen.graphs] == ["training"] and seen.graphs[0] is step.compiled.record
    assert "aten.addmm" in str(step.graph) and "test_training.py" not in step.compiled.parameters
    assert step.compiled.coverage.fallback == 0 and step.compiled.kernels
    assert step.compiled.step("normalise").pass_name == "normalise" and "mean" in step.compiled.diff(0) + "mean"
    step.report(tmp_path / "step.html")
    assert "kernel" in (tmp_path / "step.html").read_text()


# -- refusals -----------------------------------------------------------------------------------------------------------


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1)


def test_a_wrapper_or_a_hook_on_gradients_is_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(mlp())
        with pytest.raises(errors.WrappedModel, match=r"DistributedDataParallel.*\n.*the module that it wraps"):
            plait.train_step(wrapped, classes, sgd(wrapped))
        sharded = mlp()
        torch.distributed.fsdp.fully_shard(sharded)
        with pytest.raises(errors.WrappedModel, match="FSDP"):
            plait.train_step(sharded, classes, sgd(sharded))
    finally:
        torch.distributed.destroy_process_group()
    model = mlp()
    handle = model.get_parameter("0.weight").register_hook(lambda g: g)
    with pytest.raises(errors.WrappedModel, match=r"hook on the gradient of '0\.weight'"):
        plait.train_step(model, classes, sgd(model))
    handle.remove()
    model.register_full_backward_hook(lambda *_: None)
    with pytest.raises(errors.WrappedModel, match="backward hooks"):
        plait.train_step(model, classes, sgd(model))
    model = mlp()
    with pytest.raises(errors.WrappedModel, match="LBFGS"):
        plait.train_step(model, classes, torch.optim.LBFGS(model.parameters()))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, x, y: m(x), r"float32\[8, 5\]"),
        (lambda m, x, y: m(x).argmax(), r"int64\[\]"),
        (lambda m, x, y: 3.0, "got float"),
        (lambda m, x, y: (classes(m, x, y), 1), "got"),
    ],
)
def test_a_loss_that_is_no_number_is_refused(loss: Any, message: str) -> None:
    model = mlp()
    with pytest.raises(errors.LossIsNoScalar, match=message):
        plait.train_step(model, loss, sgd(model))(*vectors(torch.float32))


def test_nothing_to_train_is_refused() -> None:
    model = mlp()
    with pytest.raises(errors.NothingToTrain, match="the loss depends on no parameter"):
        plait.train_step(model, lambda m, x, y: m(x).detach().sum(), sgd(model))(*vectors(torch.float32))
    optimizer = sgd(model)
    model.requires_grad_(False)
    with pytest.raises(errors.NothingToTrain, match="no parameter of the model"):
        plait.train_step(model, classes, optimizer)


def test_parameters_that_are_not_the_models_are_refused() -> None:
    model = mlp()
    with pytest.raises(errors.ForeignParameters, match=r"parameter 0 of the optimizer's group 0, \[24, 12\]"):
        plait.train_step(model, classes, sgd(mlp()))
    x, y = vectors(torch.float32)
    with pytest.raises(errors.ForeignParameters, match="requires gradients"):
        plait.train_step(model, classes, sgd(model))(x.requires_grad_(), y)


def test_several_devices_are_refused() -> None:
    model = mlp()
    model.get_submodule("0").to("meta")
    with pytest.raises(errors.SeveralDevices, match="cpu, meta"):
        plait.train_step(model, classes, sgd(model))


@pytest.mark.parametrize("mesh", ["data", 2])
def test_what_is_no_mesh_is_refused(mesh: Any) -> None:
    model = mlp()
    with pytest.raises(errors.BadMesh, match=repr(mesh)):
        plait.train_step(model, classes, sgd(model), mesh)


def branching(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if x.sum() > 0:
        return classes(model, x, y)
    return -classes(model, x, y)


def test_a_step_that_branches_on_data_is_refused_and_changes_nothing() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    gradient = torch.ones(24)
    model.get_parameter("0.bias").grad = gradient
    with pytest.raises(errors.CannotCaptureStep, match=r"[Dd]ata-dependent") as caught:
        plait.train_step(model, branching, sgd(model))(*vectors(torch.float32))
    line = branching.__code__.co_firstlineno + 1
    assert caught.value.source is not None and caught.value.source.endswith(f"test_training.py:{line}")
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert model.get_parameter("0.bias").grad is gradient


def test_what_torch_says_of_a_failure_is_told_with_the_line() -> None:
    model = mlp()

    def wrong(m: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such batch")

    with pytest.raises(errors.CannotCaptureStep, match="no such batch") as caught:
        plait.train_step(model, wrong, sgd(model))(*vectors(torch.float32))
    assert str(caught.value.source).endswith(f"test_training.py:{wrong.__code__.co_firstlineno + 1}")
    with pytest.raises(errors.CannotCaptureStep, match=r"batch_size|batch size|size"):
        plait.train_step(model, lambda m, x, y: classes(m, x, y[:3]), sgd(model))(*vectors(torch.float32))
    sparse = nn.EmbeddingBag(10, 4, sparse=True)
    with pytest.raises(errors.CannotCaptureStep, match="sparse_coo"):
        plait.train_step(sparse, lambda m, y: m(y[None]).sum(), torch.optim.SGD(sparse.parameters(), 0.1))(torch.arange(5))


def test_a_step_has_no_graph_before_its_first_call() -> None:
    model = mlp()
    with pytest.raises(errors.NotCompiledYet):
        _ = plait.train_step(model, classes, sgd(model)).graph


def test_too_many_signatures_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait.compiler.training.api.SIGNATURES", 2)
    model = mlp()
    step = plait.train_step(model, classes, sgd(model))
    for count in (3, 4):
        step(*vectors(torch.float32, count))
    with pytest.raises(errors.TooManySignatures, match="2 signatures"):
        step(*vectors(torch.float32, 5))
    step(*vectors(torch.float32, 3))


def test_what_has_no_derivative_is_refused() -> None:
    model = mlp()
    with pytest.raises(errors.CannotCaptureStep, match="derivative for 'unique_consecutive' is not implemented"):
        plait.train_step(model, lambda m, x, y: m(x).unique_consecutive().sum(), sgd(model))(*vectors(torch.float32))


def test_a_fallback_can_be_refused() -> None:
    model = mlp()
    step = plait.train_step(model, lambda m, x, y: m(x).logcumsumexp(0).sum(), sgd(model), options={"fallback": "error"})
    with pytest.raises(errors.FallbackRefused, match="logcumsumexp"):
        step(*vectors(torch.float32))


# -- what else loops do -------------------------------------------------------------------------------------------------


def autocast(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return classes(model, x, y)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = mlp(0.3), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False))


def test_autocast_is_part_of_the_step() -> None:
    torch.manual_seed(0)
    mine, theirs, losses, step = both(mlp(), autocast, "sgd", [vectors(torch.float32) for _ in range(5)])
    assert max(losses) < 2e-2 and max(far(mine, theirs).values()) < 2e-2
    assert "bf16" in str(step.graph)


def test_checkpointed_models_train() -> None:
    torch.manual_seed(0)
    mine, theirs, losses, _ = both(Checkpointed().double(), classes, "sgd", [vectors() for _ in range(5)])
    assert max(losses) < 1e-12 and max(far(mine, theirs).values()) < 1e-12


def test_gradients_can_be_clipped_before_the_optimizer_steps() -> None:
    torch.manual_seed(0)
    model = mlp().double()
    theirs = copy.deepcopy(model)
    optimizers = [OPTIMIZERS["adamw"](m.parameters()) for m in (model, theirs)]
    for m, optimizer in zip((model, theirs), optimizers, strict=True):
        optimizer.register_step_pre_hook(lambda *_, m=m: nn.utils.clip_grad_norm_(m.parameters(), 0.1) and None)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in optimizers]
    step = plait.train_step(model, classes, optimizers[0])
    for _ in range(4):
        batch = vectors()
        step(*batch)
        eager_step(theirs, classes, optimizers[1], batch)
        for schedule in schedules:
            schedule.step()
    assert max(far(model, theirs).values()) < 1e-12


def test_configuration_and_gradient_mode_stay_as_they_are() -> None:
    model = mlp()
    step = plait.train_step(model, classes, sgd(model))
    before = torch._dynamo.config.capture_scalar_outputs
    with torch.no_grad():
        assert not step(*vectors(torch.float32)).requires_grad
        assert not torch.is_grad_enabled()
    assert model.get_parameter("0.weight").grad is not None
    assert torch._dynamo.config.capture_scalar_outputs == before


@pytest.mark.parametrize("make", [mlp, lambda: mlp(0.3), Shared])
def test_steps_within_a_budget_begin_op_by_op(make: Any) -> None:
    torch.manual_seed(0)
    batches = (
        [vectors() for _ in range(6)] if make is not Shared else [(torch.rand(6, dtype=torch.float64),) for _ in range(6)]
    )
    loss = classes if make is not Shared else (lambda m, x: m(x))
    model = make().double()
    theirs = copy.deepcopy(model)
    optimizers = [OPTIMIZERS["sgd"](m.parameters()) for m in (model, theirs)]
    step = plait.train_step(model, loss, optimizers[0], options={"compile_budget_s": 0.0})
    for number, batch in enumerate(batches):
        if number == 2:
            plait.wait()
        torch.manual_seed(number)
        value = step(*batch)
        torch.manual_seed(number)
        assert abs((value - eager_step(theirs, loss, optimizers[1], batch)).item()) < 1e-12
        same_gradients(model, theirs, 1e-12)
    assert step.compiled.record.plan == "" and [s.outcome for s in step.compiled.record.swaps] == ["swapped in"]
    assert max(far(model, theirs).values()) < 1e-12


class Clamped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.5, 0.5)
        return x @ self.weight


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.LSTM(12, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(x[:, None].expand(-1, 3, -1))[0][:, -1])


@pytest.mark.parametrize("make", [Clamped, Recurrent, lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(12, 5))])
def test_models_that_change_parameters_or_recur(make: Any) -> None:
    torch.manual_seed(0)
    mine, theirs, losses, _ = both(make().double(), classes, "sgd", [vectors() for _ in range(4)])
    assert max(losses) < 1e-12 and max(far(mine, theirs).values()) < 1e-12


def test_two_steps_on_one_model_do_not_disturb_each_other() -> None:
    torch.manual_seed(0)
    model = mlp().double()
    theirs = copy.deepcopy(model)
    other = lambda m, x, y: m(x).square().mean()  # noqa: E731
    mine, eager = sgd(model), sgd(theirs)
    steps = [(plait.train_step(model, loss, mine), loss) for loss in (classes, other)]
    for i in range(6):
        batch = vectors()
        step, loss = steps[i % 2]
        assert abs((step(*batch) - eager_step(theirs, loss, eager, batch)).item()) < 1e-12
    assert [len(step.variants) for step, _ in steps] == [1, 1]
    assert max(far(model, theirs).values()) < 1e-12
