"""Automatic batching of dynamic control flow, beside DyNet and one by one."""

from __future__ import annotations

from .. import batching
from ..runner import Letter, Suite

SUITE = Suite(
    "autobatch",
    "batch programs that are written for one instance",
    (
        Letter(
            "a",
            "seven models against their instances one by one, forward and gradients",
            "all equal",
            batching.equal,
            sample="fewer sizes",
            seconds=25.0,
        ),
        Letter(
            "b",
            "every model beside DyNet (the best of its strategies) and eager one by one",
            "TreeLSTM of 64: 2.5x DyNet C++ at widths 32 and 64, 1.5x at 256; its Python API 3x, 3x and 1.9x; training 2x; "
            "DRNN and StackRNN 4x naive DyNet and 1.5x lock-stepped DyNet; early exit 1.8x eager (all threads 3x); "
            "MV-RNN 1.5x the best; nothing slower than eager",
            batching.beside,
            sample="TreeLSTM of width 64",
            seconds=15.0,
        ),
        Letter(
            "c",
            "what each optimisation is worth; launches beside DyNet's",
            "a quarter of DyNet's launches on every model",
            batching.ablation,
        ),
        Letter(
            "d",
            "the batched kernels in Triton, forward and backward: interpreted, and compiled for sm_90",
            "all equal to the references; on a GPU, where one is at hand, timed beside eager and other schedulers",
            batching.kernels,
        ),
        Letter(
            "e",
            "generated programs with control flow against their instances one by one",
            "all equal",
            batching.generated,
            sample="6 programs",
            seconds=8.0,
        ),
    ),
)
