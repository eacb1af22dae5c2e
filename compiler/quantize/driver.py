"""What `plait quantize` does: from a source and calibration data to an artifact, checkpoints and a page."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..aot import ALL_CPUS, Done, finish
from ..source import Source, Targets
from . import resume
from .api import Progress, quantize
from .result import QuantizedModel


@dataclass(frozen=True)
class Outputs:
    """What is written: an artifact with binaries for `targets`; where they are named, checkpoints in the layouts of AutoAWQ
    and compressed-tensors, into folders, and an HTML page."""

    artifact: str
    targets: Targets = ALL_CPUS
    awq: str | None = None
    compressed: str | None = None
    page: str | None = None


@dataclass(frozen=True)
class Made:
    """What was made: the quantized model, its `error`, what became of its compilation, seconds of all the work by parts."""

    model: QuantizedModel
    done: Done
    error: float
    seconds: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        """Plain data: the report, the error, what runs where, and times."""
        return {
            "error": self.error,
            "batches": len(self.model.batches),
            **self.model.as_json(),
            "seconds": {k: round(v, 3) for k, v in self.seconds.items()},
            "coverage": asdict(self.done.coverage),
            "device_coverage": {name: asdict(found) for name, found in self.done.device_coverage.items()},
        }


def quantize_source(
    source: Source, calib: Any, outputs: Outputs, keep: str | Path | None, progress: Progress, **how: Any
) -> Made:
    """Quantize a model of the command line and write what is asked for.

    calib: a file, or batches. keep: the folder where finished layers are kept; the one beside the artifact (`resume.beside`)
    is removed when all is written, and no folder is left where nothing was finished. progress, how: arguments of `quantize`.
    Raises what `quantize`, `save`, `save_awq` and `save_compressed` raise.
    """
    start = time.perf_counter()
    try:
        model = quantize(
            source.model, calib, examples=source.inputs, dynamic_shapes=source.dynamic_shapes, resume=keep,
            progress=progress, **how,
        )  # fmt: skip
        progress(1, 1, "building the artifact")
        compiling = time.perf_counter()
        done = finish(model.prepare(), outputs.artifact, outputs.targets, compiling)
        progress(1, 1, "measuring the error of the results")
        measuring = time.perf_counter()
        error = model.error
        seconds = {"quantize": compiling - start, **done.seconds, "measure": time.perf_counter() - measuring}
        if outputs.page is not None:
            model.report(outputs.page)
        if outputs.awq is not None:
            model.save_awq(outputs.awq)
        if outputs.compressed is not None:
            model.save_compressed(outputs.compressed)
    except BaseException:
        if keep is not None and not resume.finished(keep):
            resume.remove(keep)
        raise
    if keep is not None and Path(keep) == resume.beside(outputs.artifact):
        resume.remove(keep)
    return Made(model, done, error, seconds)
