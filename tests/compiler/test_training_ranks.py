"""Compiled training steps on two ranks against one process that has the whole batch."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from typing import Any

import plait
import pytest
import torch
import torch.distributed as dist
from plait import errors
from torch import nn

from tests.compiler.training_models import GPT, MODELS, OPTIMIZERS, classes, eager_step, mlp, next_token, texts, vectors
from tests.runtime.ranks import on_ranks


def part(batch: tuple[torch.Tensor, ...], rank: int, size: int) -> tuple[torch.Tensor, ...]:
    return tuple(t.chunk(size)[rank] for t in batch)


def far(mine: nn.Module, theirs: nn.Module) -> float:
    return max((p - q).abs().max().item() for p, q in zip(mine.parameters(), theirs.parameters(), strict=True))


def dense(rank: int, size: int, name: str, optimizer: str, bucket_mb: float) -> tuple[float, str]:
    """How far a model is from the one trained on whole batches; the graph."""
    make, loss, batch = MODELS[name]
    torch.manual_seed(rank)  # what ranks begin with differs: the first one's is taken
    model = make().double()
    mesh = dist.init_device_mesh("cpu", (size,))
    step = plait.train_step(model, loss, OPTIMIZERS[optimizer](model.parameters()), mesh, options={"bucket_mb": bucket_mb})
    whole = copy.deepcopy(model)
    other = OPTIMIZERS[optimizer](whole.parameters())
    torch.manual_seed(7)
    for _ in range(5):
        given = batch()
        value = step(*part(given, rank, size))
        losses = [torch.empty_like(value) for _ in range(size)]
        dist.all_gather(losses, value)
        expected = eager_step(whole, loss, other, given)
        assert abs(sum(losses).item() / size - expected.item()) < 1e-12
    return far(model, whole), str(step.graph)


def placed(rank: int, size: int) -> list[tuple[int, int]]:
    """For each bucket, how many products come before it is sent, and before it is waited for."""
    model = GPT(layers=2).double()
    step = plait.train_step(model, next_token, OPTIMIZERS["sgd"](model.parameters()), dist.group.WORLD,
                            options={"bucket_mb": 0.05})  # fmt: skip
    step(*texts())
    products = 0
    sent: dict[Any, int] = {}
    found: list[tuple[int, int]] = []
    for n in step.graph.nodes:
        products += n.op.name == "aten.mm.default"
        if n.op.name == "_c10d_functional.all_reduce.default":
            sent[n.results[0]] = products
        elif n.op.name == "_c10d_functional.wait_tensor.default":
            found.append((sent[n.args[0]], products))
    return found


class Experts(nn.Module):
    """One expert for each rank: rows of the batch go to the rank that their first number names, and back."""

    def __init__(self, marked: bool) -> None:
        super().__init__()
        self.gate, self.expert = nn.Linear(12, 12), nn.Linear(12, 12)
        for p in self.expert.parameters() if marked else ():
            p.plait_local = True  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.gate(x)
        group = dist.group.WORLD
        assert group is not None
        there = dist._functional_collectives.all_to_all_single_autograd(x, None, None, group)
        return dist._functional_collectives.all_to_all_single_autograd(self.expert(there).relu(), None, None, group)


def local(rank: int, size: int, marked: bool) -> float:
    torch.manual_seed(rank)
    model = Experts(marked).double()
    before = copy.deepcopy(model.expert.state_dict())
    loss = lambda m, x: m(x).square().mean()  # noqa: E731
    step = plait.train_step(
        model, loss, OPTIMIZERS["sgd"](model.parameters()), dist.group.WORLD, local=() if marked else ("expert.*",)
    )
    assert all(torch.equal(t, before[n]) for n, t in model.expert.state_dict().items())  # its own on each rank
    gates = [copy.deepcopy(model.gate.state_dict())] * size
    experts: list[Any] = [None] * size
    dist.all_gather_object(experts, before)
    whole = nn.ModuleDict({"gate": nn.Linear(12, 12), **{f"e{r}": nn.Linear(12, 12) for r in range(size)}}).double()
    whole["gate"].load_state_dict(gates[0])
    for r in range(size):
        whole[f"e{r}"].load_state_dict(experts[r])
    other = OPTIMIZERS["sgd"](whole.parameters())

    def reference(model: Any, x: torch.Tensor) -> torch.Tensor:  # x: ranks, experts, rows, 12
        y = model["gate"](x)
        return torch.stack([model[f"e{r}"](y[:, r]).relu() for r in range(size)], 1).square().mean()

    torch.manual_seed(3)
    for _ in range(4):
        x = torch.randn(size, size, 3, 12, dtype=torch.float64)
        step(x[rank].flatten(0, 1))
        eager_step(whole, reference, other, (x,))
    assert far(model.gate, whole["gate"]) < 1e-12
    return far(model.expert, whole[f"e{rank}"])


def mixture(group: Any) -> nn.Module:
    """The same experts, whichever rank holds them; none of them is ever full."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(12, 16), plait.moe.MoE(16, 32, 4, "top2", None, group, gated=True), nn.LayerNorm(16), nn.Linear(16, 5)
    ).double()


def moe(rank: int, size: int) -> float:
    model, whole = mixture(dist.group.WORLD), mixture(None)
    optimizers = [OPTIMIZERS["sgd"](m.parameters()) for m in (model, whole)]
    step = plait.train_step(model, classes, optimizers[0], dist.group.WORLD)
    torch.manual_seed(3)
    for _ in range(4):
        batch = vectors(count=12)
        step(*part(batch, rank, size))
        eager_step(whole, classes, optimizers[1], batch)
    distances = [0.0]
    for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
        mine = q.detach().chunk(size)[rank] if ".experts." in name else q.detach()
        distances.append((p.detach() - mine).abs().max().item())
    assert str(step.graph).count("plait.all_to_all_capacity") == 4
    return max(distances)


class Routed(nn.Module):
    """Rows go to the rank that `to` names for each of them, through its expert, and back: as many as there are."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.expert = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        group, exchange = dist.group.WORLD, dist._functional_collectives
        assert group is not None
        order, counts = to.argsort(stable=True), nn.functional.one_hot(to, 2).sum(0)
        send, receive = counts.tolist(), exchange.all_to_all_single(counts, None, None, group).tolist()
        there = exchange.all_to_all_single_autograd(self.gate(x)[order], receive, send, group)
        back = exchange.all_to_all_single_autograd(self.expert(there).relu(), send, receive, group)
        return torch.zeros_like(x).index_copy(0, order, back)


def routes(rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches: uneven ones, one where a rank gets nothing, one where each keeps what it has."""
    torch.manual_seed(rank)
    to = [torch.randint(2, (6,)), torch.zeros(6, dtype=torch.int64), torch.full((6,), rank), torch.randint(2, (6,))]
    return [(torch.randn(6, 12, dtype=torch.float64), t) for t in to]


def uneven(rank: int, size: int, compiled: str) -> float:
    """How far gradients are from those of eager, at most."""
    torch.manual_seed(1)
    model = Routed().double()
    theirs = copy.deepcopy(model)
    loss = lambda m, *batch: m(*batch).square().sum()  # noqa: E731
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    distances = [0.0]
    with torch._dynamo.config.patch(capture_scalar_outputs=compiled == "backend"):
        if compiled == "backend":
            fast = torch.compile(model, backend="plait", fullgraph=True)
        else:
            step = plait.train_step(model, loss, optimizer, dist.group.WORLD, local=("expert.*",))
        for batch in routes(rank):
            optimizer.zero_grad()
            theirs.zero_grad()
            value = loss(theirs, *batch)
            value.backward()
            if compiled == "backend":
                with torch.no_grad():
                    distances.append((fast(*batch) - theirs(*batch)).abs().max().item())
                mine = loss(fast, *batch)
                mine.backward()
            else:
                mine = step(*batch)
                for p in theirs.gate.parameters():
                    dist.all_reduce(p.grad)
            distances.append((mine - value).abs().item())
            for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
                assert p.grad is not None and q.grad is not None
                distances.append((p.grad * (1 if compiled == "backend" else size) - q.grad).abs().max().item())
    if compiled == "step":
        assert len(step.variants) == 1  # splits are no part of the signature
    return max(distances)


def predicted(rank: int, size: int) -> tuple[bool, int, int, float]:
    """Whether a step trains on as if nothing had been predicted in between; collectives predicted and measured; seconds."""
    losses: list[list[float]] = []
    for asks in (False, True):
        model = mixture(dist.group.WORLD).float()
        step = plait.train_step(model, classes, OPTIMIZERS["sgd"](model.parameters()), dist.group.WORLD)
        torch.manual_seed(rank)
        batches = [vectors(torch.float32, 12) for _ in range(3)]
        losses.append([])
        for batch in batches:
            found = step.predicted(*batch) if asks else None
            losses[-1].append(step(*batch).item())
    assert found is not None and found.measured > 0 and found.exposed > 0
    planned = sum(t.stream == "communication" for t in found.timeline.tasks)
    return losses[0] == losses[1], planned, len(found.records), found.seconds


def meshes(rank: int, size: int) -> bool:
    model = mlp()
    with pytest.raises(errors.BadMesh, match="2 dimensions"):
        plait.train_step(model, classes, OPTIMIZERS["sgd"](model.parameters()), dist.init_device_mesh("cpu", (size, 1)))
    alone = dist.new_group([0])
    if rank:
        with pytest.raises(errors.BadMesh):
            plait.train_step(model, classes, OPTIMIZERS["sgd"](model.parameters()), alone)
    return True


def differing(rank: int, size: int) -> tuple[str]:
    """What is said where ranks would send different buckets, on a group of its own."""
    model = mlp()
    options = {"bucket_mb": 4.0 if rank else 0.001}
    step = plait.train_step(model, classes, OPTIMIZERS["sgd"](model.parameters()), dist.new_group([0, 1]), options=options)
    with pytest.raises(errors.PlansDiffer) as caught:
        step(*vectors(torch.float32))
    return (str(caught.value),)


CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "mlp": (dense, ("mlp", "adamw", 4.0)),
    "gpt": (dense, ("gpt", "sgd", 0.05)),
    "placed": (placed, ()),
    "marked": (local, (True,)),
    "named": (local, (False,)),
    "moe": (moe, ()),
    "uneven-backend": (uneven, ("backend",)),
    "uneven-step": (uneven, ("step",)),
    "predicted": (predicted, ()),
    "meshes": (meshes, ()),
    "differing": (differing, ()),
}


def run_cases(rank: int, size: int) -> dict[str, Any]:
    """What each case gives, or its traceback: processes are started once for all."""
    found: dict[str, Any] = {}
    for name, (case, args) in CASES.items():
        try:
            found[name] = case(rank, size, *args)
        except Exception:
            found[name] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def results() -> Callable[[str], list[Any]]:
    """What a case gave on each rank."""
    found = on_ranks(run_cases, 2, timeout=240.0)

    def of(name: str) -> list[Any]:
        failed = [f"rank {r}: {one[name]}" for r, one in enumerate(found) if isinstance(one[name], str)]
        assert not failed, "\n".join(failed)
        return [one[name] for one in found]

    return of


@pytest.mark.parametrize(("name", "sent"), [("mlp", 1), ("gpt", 6)])
def test_two_ranks_train_as_one_does_on_the_whole_batch(results: Any, name: str, sent: int) -> None:
    found = results(name)
    assert max(distance for distance, _ in found) < 1e-12
    assert found[0][1] == found[1][1]  # the graph is the same on all ranks
    assert found[0][1].count("_c10d_functional.all_reduce.default") == sent


def test_a_bucket_is_sent_where_it_is_full_and_waited_for_at_the_end(results: Any) -> None:
    found = results("placed")[0]
    begins = [sent for sent, _ in found]
    assert begins == sorted(begins) and begins[0] < begins[-1] // 2
    assert {waited for _, waited in found} == {max(begins)}


@pytest.mark.parametrize("how", ["marked", "named"])
def test_gradients_of_local_parameters_are_divided_only(results: Any, how: str) -> None:
    assert max(results(how)) < 1e-12


def test_experts_train_as_they_do_on_one_rank(results: Any) -> None:
    assert max(results("moe")) < 1e-12


@pytest.mark.parametrize("how", ["backend", "step"])
def test_uneven_exchanges_that_data_decide(results: Any, how: str) -> None:
    assert max(results(f"uneven-{how}")) < 1e-12


def test_predictions_change_nothing_and_take_both_ranks_together(results: Any) -> None:
    for same, planned, measured, seconds in results("predicted"):
        assert same and planned == measured == 5 and seconds > 0


def test_meshes_of_several_dimensions_and_groups_of_others_are_refused(results: Any) -> None:
    assert all(results("meshes"))


def test_ranks_that_would_send_different_buckets_say_so(results: Any) -> None:
    assert all("all_reduce" in text for (text,) in results("differing"))
