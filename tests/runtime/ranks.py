"""Runs a function on several ranks of a gloo group, each a process of its own, for tests of collectives."""

import multiprocessing
import sys
import tempfile
import time
import traceback
from datetime import timedelta

PRELOADED = ["torch", "torch.distributed", "torch.distributed._functional_collectives", "plait.runtime.executor"]


def _rank(pipe, path, function, rank, size, args):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{path}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
        )
        pipe.send((True, function(rank, size, *args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    sys.stdout.flush()
    pipe.recv()  # stay until all are done: what a rank says when another one leaves is no part of most tests


class Ranks:
    """Processes that run `function(rank, size, *args)`, from a server that has imported torch already."""

    def __init__(self, function, size, *args):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank, args=(theirs, f"{self._folder.name}/store", function, rank, size, args), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join(10)
        self._folder.cleanup()

    def result(self, rank, timeout=60.0):
        """What the function gave on a rank. Fails with the rank's traceback."""
        assert self._pipes[rank].poll(timeout), f"rank {rank} has not ended after {timeout} s"
        ok, value = self._pipes[rank].recv()
        assert ok, f"rank {rank} failed:\n{value}"
        return value


def on_ranks(function, size, *args, timeout=60.0):
    """What `function(rank, size, *args)` gives on each rank."""
    until = time.monotonic() + timeout
    with Ranks(function, size, *args) as ranks:
        return [ranks.result(rank, max(until - time.monotonic(), 0.1)) for rank in range(size)]
