"""Run printed Triton kernels on CPU tensors, by Triton's interpreter in a process of its own.

Triton decides at import whether its functions compile or are interpreted, so the interpreter cannot share a process with
the compiler. One worker serves any number of kernels; starting it costs a few seconds, a small kernel some milliseconds.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ...errors import InterpretationFailed, InterpretationTimedOut
from .source import KernelConfig, TritonSource

_WORKER = Path(__file__).with_name("interpreter_worker.py")


class Interpreter:
    """A worker process that interprets kernels; a context manager that ends it. The process starts at the first use and
    serves one thread at a time.

    timeout: seconds that one kernel may take before the worker is killed.
    """

    def __init__(self, timeout: float = 60.0) -> None:
        self.timeout = timeout
        self._folder = tempfile.TemporaryDirectory(prefix="plait-interpret-")
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Interpreter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the worker and delete its files."""
        self._stop()
        self._folder.cleanup()

    def run(
        self,
        source: TritonSource,
        tensors: Mapping[str, torch.Tensor],
        sizes: Mapping[str, int],
        config: KernelConfig | None = None,
    ) -> dict[str, torch.Tensor]:
        """Run every program of `source` and return the buffers that it may write, as new tensors of the same layout.

        A kernel addresses memory linearly from a tensor's first element; `tensors` (CPU, any strides) are not changed.
        `config` sets tile sizes other than the default. Raises InterpretationFailed when the kernel raises or touches
        memory outside its buffers, InterpretationTimedOut when it takes too long.
        """
        config = config or source.config
        results = [b.name for b in source.buffers if b.access != "read"]
        programs = source.programs(sizes, config)
        if programs == 0:
            return {name: tensors[name].clone() for name in results}
        folder = Path(self._folder.name)
        module = folder / f"{source.hash}.py"
        if not module.exists():
            module.write_text(source.text)
        save_file({b.name: _memory(tensors[b.name]).clone() for b in source.buffers}, folder / "tensors")
        self._ask(source, {
            "module": str(module), "function": source.name, "grid": programs, "tiles": dict(config.tiles),
            "buffers": [b.name for b in source.buffers], "sizes": [sizes[name] for name in source.sizes],
            "tensors": str(folder / "tensors"), "results": results, "results_file": str(folder / "results"),
        })  # fmt: skip
        memory = load_file(folder / "results")
        return {name: memory[name].as_strided(tensors[name].shape, tensors[name].stride()) for name in results}

    def _ask(self, source: TritonSource, request: dict[str, Any]) -> None:
        process = self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            self._died(source, process)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(self.timeout):
                self._stop()
                raise InterpretationTimedOut(kernel=source.name, seconds=self.timeout)
        line = process.stdout.readline()
        if not line:
            self._died(source, process)
        answer = json.loads(line)
        if answer:
            raise InterpretationFailed(kernel=source.name, why=answer["error"], details=answer["traceback"])

    def _died(self, source: TritonSource, process: subprocess.Popen[str]) -> None:
        code = process.wait()
        self._stop()
        raise InterpretationFailed(kernel=source.name, why=f"the worker ended with code {code}", details="")

    def _start(self) -> subprocess.Popen[str]:
        if self._process is None:
            environment = {**os.environ, "TRITON_INTERPRET": "1"}
            pipe = subprocess.PIPE
            command = [sys.executable, str(_WORKER)]
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        return self._process

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process = None


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    """The elements that `tensor` spans, from its first to its last, as a vector."""
    if tensor.numel() == 0:
        return tensor.reshape(0)
    reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((reach,), (1,))
