"""Collectives between processes: exchanges with a capacity, channels, and what happens when ranks die or stall."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from plait import all_to_all_capacity
from plait.errors import BadExchange, BadSetting, ChannelBroken, CollectiveFailed, CollectiveTimedOut, NoSuchGroup
from plait.runtime import collectives
from plait.runtime.collectives import Work
from plait.runtime.exchange import exchange

from tests.runtime.ranks import Ranks, on_ranks

ROOT = Path(__file__).parent.parent.parent
OP = torch.ops.plait.all_to_all_capacity


def make_rows(generator, groups, capacity):
    """Random used rows [groups, 2]; some groups have none."""
    ends = torch.randint(0, capacity + 1, (groups, 2), generator=generator).sort(1).values
    ends[torch.rand(groups, generator=generator) < 0.2] = 0
    return ends


def dense(buf, rows):
    """The buffer with zeros outside of its used rows."""
    at = torch.arange(buf.shape[1])
    used = (at >= rows[:, :1]) & (at < rows[:, 1:])
    return torch.where(used[..., None], buf, torch.zeros((), dtype=buf.dtype))


def reference(buf, rows):
    """Whole buffers by all_to_all_single."""
    sent = dense(buf, rows).contiguous()
    out, came = torch.empty_like(sent), torch.empty_like(rows)
    dist.all_to_all_single(out, sent)
    dist.all_to_all_single(came, rows.contiguous())
    return out, came


def exchanges(rank, size, seed):
    generator = torch.Generator().manual_seed(seed * size + rank)
    for local, capacity, width, dtype in (
        (1, 7, 5, torch.float32),
        (3, 40, 64, torch.bfloat16),
        (2, 300, 96, torch.float64),
        (2, 0, 4, torch.float32),
        (0, 8, 4, torch.float32),
        (2, 5, 0, torch.float32),
        (4, 64, 33, torch.int8),
    ):
        buf = torch.randint(-99, 99, (local * size, capacity, width), generator=generator).to(dtype)
        rows = make_rows(generator, local * size, capacity)
        expected, came = reference(buf, rows)
        out, got = OP(buf, rows, None, dist.group.WORLD.group_name)
        assert torch.equal(out, expected) and torch.equal(got, came), (local, capacity, width, dtype)
        out, got = OP(buf, rows, came, dist.group.WORLD.group_name)
        assert torch.equal(out, expected) and torch.equal(got, came) and got is not came
    return True


@pytest.mark.parametrize("size", [1, 2, 4])
def test_an_exchange_is_the_all_to_all_of_whole_buffers(size):
    assert all(on_ranks(exchanges, size, 7))


def faces(rank, size):
    buf = torch.arange(2.0 * size * 3 * 4).reshape(2 * size, 3, 4) + 1000 * rank
    counts = torch.tensor([0, 1, 2, 3])[: 2 * size].to(torch.int32)
    rows = torch.stack([torch.zeros(2 * size, dtype=torch.int64), counts.long()], 1)
    expected, came = reference(buf, rows)
    mesh = dist.init_device_mesh("cpu", (size,))
    for group in (dist.group.WORLD, dist.group.WORLD.group_name, mesh):
        out, got = all_to_all_capacity(buf, counts, group)
        assert torch.equal(out, expected) and torch.equal(got, came[:, 1]) and got.dtype == torch.int32
        out, got = all_to_all_capacity(buf.transpose(1, 2).contiguous().transpose(1, 2), rows, group)
        assert torch.equal(out, expected) and torch.equal(got, came)
    for bad, used, why in (
        (buf[0], rows, "must be"),
        (buf[1:], rows[1:], "cannot be shared among 2 ranks"),
        (buf, rows[1:], "rows must be int64"),
        (buf, rows + 2, "the groups have 3 rows"),
    ):
        with pytest.raises(BadExchange, match=why):
            all_to_all_capacity(bad, used, dist.group.WORLD)
    with pytest.raises(NoSuchGroup, match="no process group 'nobody'"):
        OP(buf, rows, None, "nobody")
    all_to_all_capacity(buf, counts, mesh)  # mistakes of the arguments do no harm
    return True


def test_the_public_function_takes_counts_rows_and_any_kind_of_group():
    assert all(on_ranks(faces, 2))


def gradients(rank, size, compiled):
    generator = torch.Generator().manual_seed(rank)
    buf = torch.randint(-9, 9, (2 * size, 6, 4), generator=generator).double()
    weight = torch.randint(-9, 9, (2 * size, 6, 4), generator=generator).double()
    rows = make_rows(generator, 2 * size, 6)

    def loss(exchange, x):
        return (exchange(x * x, rows) * weight).sum()

    def dense_exchange(x, rows):
        # the same as dense algebra on all ranks' buffers, which autograd differentiates by itself
        parts = [torch.empty_like(x) for _ in range(size)]
        dist.all_gather(parts, x.detach())
        parts[rank] = x
        return torch.cat([p[rank * 2 : rank * 2 + 2] for p in (dense(p, r) for p, r in zip(parts, all_rows, strict=True))])

    all_rows = [torch.empty_like(rows) for _ in range(size)]
    dist.all_gather(all_rows, rows)
    all_weights = [torch.empty_like(weight) for _ in range(size)]
    dist.all_gather(all_weights, weight)
    # what this rank's buffer is multiplied with, wherever it went
    arrived = torch.cat([w[rank * 2 : rank * 2 + 2] for w in all_weights])

    group = dist.group.WORLD
    run = lambda x: loss(lambda y, r: all_to_all_capacity(y, r, group)[0], x)  # noqa: E731
    if compiled:
        run = torch.compile(run, backend=compiled, fullgraph=True)
    x = buf.clone().requires_grad_()
    made = run(x)
    made.backward()
    z = buf.clone().requires_grad_()
    assert torch.equal(made.detach(), loss(dense_exchange, z).detach())
    (dense(z * z, rows) * arrived).sum().backward()
    return torch.equal(x.grad, z.grad)


@pytest.mark.parametrize("compiled", [None, "aot_eager", "plait"])
def test_gradients_travel_back(compiled):
    assert all(on_ranks(gradients, 2, compiled))


def traced(rank, size):
    from torch._functorch.aot_autograd import aot_export_joint_simple
    from torch.fx.experimental.proxy_tensor import make_fx

    name = dist.group.WORLD.group_name
    buf = torch.arange(2.0 * size * 3 * 4).reshape(2 * size, 3, 4) + 1000 * rank
    rows = torch.tensor([[0, 1], [1, 3], [0, 0], [0, 3]])
    expected, came = reference(buf, rows)
    gm = make_fx(lambda x, r: OP(x * 2, r, None, name), tracing_mode="fake")(buf, rows)
    out, got = gm(buf, rows)
    assert torch.equal(out, expected * 2) and torch.equal(got, came)
    joint = aot_export_joint_simple(
        lambda x, r: (OP(x * 2, r, None, name)[0],), (buf.clone().requires_grad_(), rows), trace_joint=True
    )
    calls = [n for n in joint.graph.nodes if n.target is OP.default]
    assert len(calls) == 2 and calls[1].args[2] is calls[0].args[1], "the backward exchanges no rows"
    return True


def unclear(rank, size):
    """Rows that nothing came for may hold anything where nobody reads them; those that came are what they are."""
    generator = torch.Generator().manual_seed(rank)
    buf = torch.randn(2 * size, 50, 16, generator=generator)
    rows = make_rows(generator, *buf.shape[:2])
    expected, _ = reference(buf, rows)
    out, came = torch.ops.plait.all_to_all_capacity_start(buf, rows, None, dist.group.WORLD.group_name, False)
    assert torch.equal(dense(out, came), expected)
    return True


def test_rows_that_nothing_came_for_need_not_be_clear():
    assert all(on_ranks(unclear, 2))


def test_it_is_traced():
    assert all(on_ranks(traced, 2))


def arguments(size):
    buf = torch.ones(size, 4096, 256)
    return buf, torch.tensor([[0, 4096]] * size), None, dist.group.WORLD.group_name


# -- channels -----------------------------------------------------------------------------------------------------------


def many(rank, size):
    """Exchanges of many sizes in flight, waited for in another order, between collectives of torch on the same group."""
    generator = torch.Generator().manual_seed(rank)
    channel, name = collectives.channel("0"), dist.group.WORLD.group_name
    for _ in range(3):
        flying = []
        for i in range(40):
            buf = torch.randint(-99, 99, (2 * size, 1 + 17 * (i % 7), 8 + i), generator=generator).float()
            rows = make_rows(generator, *buf.shape[:2])
            flying.append((buf, rows, channel.submit(f"exchange {i}", exchange(buf, rows, None, name))))
        found = [pending.wait() for _, _, pending in reversed(flying)]
        for (buf, rows, _), (out, came) in zip(reversed(flying), found, strict=True):
            expected, announced = reference(buf, rows)
            assert torch.equal(out, expected) and torch.equal(came, announced)
    with collectives.recording() as records:
        OP(*arguments(size))
    OP(*arguments(size))
    assert [(r.name, r.bytes) for r in records] == [("plait.all_to_all_capacity", 4096 * 256 * 4 + 48)]
    return True


def test_many_exchanges_in_flight():
    assert all(on_ranks(many, 2))


def anew(rank, size, path):
    """A group is destroyed, and another one made that gets its name."""
    buf, rows, _, name = arguments(size)
    OP(buf, rows, None, name)
    old = collectives.channel(name)
    thread = next(t for t in threading.enumerate() if t.name == f"plait-group-{name}")
    dist.destroy_process_group()
    thread.join(5)
    assert not thread.is_alive() and old.group() is None
    with pytest.raises(NoSuchGroup):
        OP(buf, rows, None, name)
    store = dist.FileStore(path, size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    assert dist.group.WORLD.group_name == name and collectives.channel(name) is not old
    OP(buf, rows, None, name)
    half = [dist.new_group([r]) for r in range(size)][rank]
    assert torch.equal(OP(buf, rows, None, half.group_name)[0], buf)
    return True


def test_a_channel_ends_with_its_group(tmp_path):
    assert all(on_ranks(anew, 2, f"{tmp_path}/store"))


def test_a_process_ends_with_its_channels(tmp_path):
    code = (
        "import torch, torch.distributed as dist, plait\n"
        f"dist.init_process_group('gloo', init_method='file://{tmp_path}/store', rank=0, world_size=1)\n"
        "buf, counts = torch.ones(2, 3, 4), torch.tensor([1, 3])\n"
        "print(plait.all_to_all_capacity(buf, counts, dist.group.WORLD)[0].sum().item())\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, timeout=60)
    assert (run.returncode, run.stdout, "Traceback" in run.stderr) == (0, "16.0\n", False), run.stderr


def test_the_time_out_is_a_setting(monkeypatch):
    from plait import config
    from plait.compiler import options  # noqa: F401  tells the runtime of the setting

    assert collectives.timeout_s() == 300
    with config.patch(collective_timeout_s=7):
        assert collectives.timeout_s() == 7
        monkeypatch.setenv(collectives.VARIABLE, "2.5")
        assert collectives.timeout_s() == config.current().collective_timeout_s == 2.5
    for bad in ("soon", "0", "-1", "nan"):
        monkeypatch.setenv(collectives.VARIABLE, bad)
        for ask in (collectives.timeout_s, config.current):
            with pytest.raises(BadSetting, match="PLAIT_COLLECTIVE_TIMEOUT_S must be a number of seconds above 0"):
                ask()


# -- faults -------------------------------------------------------------------------------------------------------------


def failing(rank, size, how):
    """What a surviving rank gets where rank 1 goes away `how`: the first error, the second, and the seconds they took."""
    os.environ[collectives.VARIABLE] = "60" if how == "die" else "1.5"
    OP(*arguments(size))
    if rank == 1 and how == "late":
        time.sleep(4)
    elif rank == 1:
        os.kill(os.getpid(), signal.SIGKILL if how == "die" else signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises((CollectiveFailed, CollectiveTimedOut)) as first:
        OP(*arguments(size))
    seconds = time.monotonic() - start
    with pytest.raises(ChannelBroken) as second:
        OP(*arguments(size))
    return first.value, second.value, seconds


@pytest.mark.parametrize("how", ["die", "stop", "late"])
@pytest.mark.parametrize("size", [2, 3])
def test_every_surviving_rank_is_told(how, size):
    with Ranks(failing, size, how) as ranks:
        found = {rank: ranks.result(rank, 20) for rank in range(size) if rank != 1 or how == "late"}
    errors = [first for first, _, _ in found.values()]
    assert any(isinstance(e, CollectiveTimedOut) for e in errors) == (how != "die"), errors
    for rank, (first, second, seconds) in found.items():
        assert seconds < 6
        text = str(first).splitlines()[0]
        assert "plait.all_to_all_capacity" in text and f"rank {rank} of {size}" in text and "group '0'" in text
        assert str(second).splitlines()[0].endswith(text)
        assert second.__cause__ is None or isinstance(second.__cause__, type(first))


def after_a_failure(rank, size, path):
    """What a failed call held is freed, and a new group in place of the broken one works."""
    if rank == 1:
        os.environ[collectives.VARIABLE] = "0.5"
    buf, rows, _, name = arguments(size)
    OP(buf, rows, None, name)
    seen = weakref.ref(buf)
    if rank == 0:
        time.sleep(1.5)
    with pytest.raises((CollectiveFailed, CollectiveTimedOut)):
        OP(buf, rows, None, name)
    del buf
    with pytest.raises(ChannelBroken):
        OP(*arguments(size))
    gc.collect()
    assert seen() is None
    thread = next(t for t in threading.enumerate() if t.name == f"plait-group-{name}")
    dist.destroy_process_group()
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()
    store = dist.FileStore(path, size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    OP(*arguments(size))
    return True


def test_a_group_that_failed_can_be_made_anew(tmp_path):
    assert all(on_ranks(after_a_failure, 2, f"{tmp_path}/store"))


def misfits(rank, size, shape, dtype):
    buf = torch.ones(shape, dtype=dtype) if rank == 1 else torch.ones(4, 3, 8)
    start = time.monotonic()
    with pytest.raises((BadExchange, CollectiveFailed)) as failed:
        OP(buf, torch.tensor([[0, buf.shape[1]]] * buf.shape[0]), None, "0")
    with pytest.raises(ChannelBroken):
        OP(*arguments(size))
    return str(failed.value), time.monotonic() - start


@pytest.mark.parametrize(
    ("shape", "dtype", "said"),
    [
        ((2, 3, 8), torch.float32, "rank 1 has a buffer [2, 3, 8], rank 0 has float32 [4, 3, 8]"),
        ((600, 5, 1), torch.float32, "rank 1 has a buffer [600, 5, 1], rank 0 has float32 [4, 3, 8]"),
        ((4, 3, 8), torch.int32, "rank 1 has a buffer [4, 3, 8] of another dtype, rank 0 has float32 [4, 3, 8]"),
    ],
)
def test_ranks_with_other_buffers_are_told(shape, dtype, said):
    found = on_ranks(misfits, 2, shape, dtype)
    assert "in plait.all_to_all_capacity on rank 0 of group '0'" in found[0][0]
    assert said in found[0][0] and all(seconds < 5 for _, seconds in found)


def unnoticed(rank, size):
    """A rank hangs in an op of torch, whose own time-out is a minute; what was queued behind it is refused."""
    os.environ[collectives.VARIABLE] = "1"
    name = dist.group.WORLD.group_name
    if rank == 1:
        time.sleep(3)
        with pytest.raises(CollectiveFailed):
            OP(*arguments(size))
        return True
    channel = collectives.channel(name)
    x = torch.ones(4)

    def hang(progress):
        dist.all_reduce(x)

    first, second = channel.submit("hang", Work(hang), source="model.py:7"), channel.submit("next", Work(hang))
    start = time.monotonic()
    with pytest.raises(CollectiveTimedOut, match=r"hang has not ended after 1 s on rank 0 of 2(.|\n)*model.py:7"):
        first.wait()
    with pytest.raises(ChannelBroken, match=r"next was not started on rank 0.*hang has not ended"):
        second.wait()
    channel.close(5.0)  # the thread did not stay behind
    return time.monotonic() - start < 5


def test_what_hangs_in_torch_is_broken_off():
    assert all(on_ranks(unnoticed, 2))
