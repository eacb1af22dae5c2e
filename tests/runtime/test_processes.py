"""Calls in forked workers, and the cost of a call."""

import os
import time

import pytest
import torch
from plait.runtime.executor import Executable
from plait.runtime.plan import Launch
from torch.utils.data import DataLoader, Dataset

from tests.runtime.kit import chain, make_plan, tensor_input, value


class Doubled(Dataset):
    def __init__(self, run):
        self.run = run

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return self.run(torch.full((100_000,), float(i)))[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_data_loader_workers(kernels):
    torch.set_num_threads(2)
    run = Executable(chain(), kernels, {})
    run(torch.randn(100_000))  # OpenMP has threads in the parent now
    batches = list(DataLoader(Doubled(run), batch_size=2, num_workers=1, multiprocessing_context="fork", timeout=30))
    assert [b[:, 0].tolist() for b in batches] == [[0, 4], [8, 12], [16, 20]]


def test_the_cost_of_a_launch(kernels):
    # a loose bound that only a step from native to Python work per launch can break
    count = 1000
    values = [value(0, "input", (8,), 0), value(1, "fresh", (8,))]
    plan = make_plan([tensor_input("x", (8,))], values, [Launch("nothing", (0, 1), (8,))] * count, [1])
    run, x = Executable(plan, kernels, {}, check=False), torch.randn(8)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        run(x)
        best = min(best, time.perf_counter() - start)
    assert best / count < 400e-9
