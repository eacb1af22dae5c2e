"""`plait.quantize`: low-bit weights for a model, chosen on calibration data, with what it costs.

quantized = plait.quantize(model, batches, scheme="awq-w4g128", ignore=["lm_head"])
print(quantized)              # loss of each layer, round-to-nearest -> result; which stay float, and why
y = quantized(x)              # compiled at the first call
quantized.module()            # the model with QuantizedLinear layers
quantized.save("model.plait")
quantized.save_awq("folder")
print(plait.what_if(model, batches))  # what each format would cost each layer; quantizes nothing
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ...errors import BadOption
from ...passes.base import Context, Step
from ...passes.quantize.observe import Batches
from ...passes.quantize.quantization import Quantization
from ...passes.quantize.scheme import Scheme
from ...passes.quantize.weights import WANT, Awq, Rtn, W8a8, Weights
from ..export import Exported, argument_names, as_arguments, capture_model, export
from ..options import Options
from . import calibration
from .measure import ROWS, measured, microseconds
from .plan import Budget, Plan, WhatIf, planned, run_pass, tabled
from .result import QuantizedModel, Skipped
from .resume import Kept

FORMATS = ("w3g128", "w4g128", "w4g32", "w8g128", "float")
"""What a budget chooses from where nobody says otherwise."""
Progress = Callable[[int, int, str], None]


def quantize(
    model: Any,
    calib: Any,
    *,
    scheme: str = "awq-w4g128",
    targets: Iterable[str] = ("Linear",),
    ignore: Iterable[str] = (),
    want: str = "faster",
    layers: Iterable[str] = (),
    constants_only: bool = False,
    budget: str | None = None,
    formats: Iterable[str] = FORMATS,
    rows: Iterable[int] = ROWS,
    dynamic_shapes: Any = None,
    examples: Any = None,
    samples: int | None = None,
    options: Mapping[str, Any] | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> QuantizedModel:
    """Quantize linear layers of a model (a module in eval mode, a function, an ExportedProgram or a `.pt2` file).

    calib: batches of inputs, or a file of them, see `calibration.batches`, or its first `samples`. The model is captured on
    `examples`, by default the first batch, with `dynamic_shapes` as torch.export takes them. scheme: `awq-w4g128`,
    `rtn-w8g64-sym`, `awq+gptq-w3g32`, `w8a8`.
    targets, ignore: layers by name or last parts of names, `re:` and an expression, or `Linear` for all. want: "faster"
    leaves layers float that would be slower than now for any of `rows` of input, measured on this machine, or larger;
    "smaller" only those that would be larger; "any" takes all.
    layers: formats of single layers, `lm_head=w8g64`, where there is no budget. constants_only: scale inputs only where
    constants take the factors, which is what checkpoints in other people's formats hold. budget: `error=0.05` (relative, of
    the model's results) or `bytes=40MB`: formats come from `formats` for each layer, see `plan`. resume: a folder where
    finished layers are kept, so that an interrupted call goes on. progress(done, of, layer) is called on the way.

    Raises BadScheme, BadCalibration, NoLayerMatches, BudgetCannotBeMet, CannotResume, BadOption, and what `plait.compile`
    raises at capture.
    """
    chosen, rows, formats = Options.of(options), tuple(rows), tuple(formats)
    limit = None if budget is None else Budget.of(budget)
    layers = tuple(layers)
    if limit is not None and layers:
        raise BadOption(name="layers", expected="left out where a budget chooses", value=", ".join(layers))
    one = pass_of(Scheme.of(scheme), targets, ignore, want, layers, constants_only)
    model = _loaded(model)
    exported, flat = _captured(model, calib, examples, samples, dynamic_shapes)
    kept = Kept(resume, exported.graph, flat, f"{one}, budget {budget} of {', '.join(formats)}")
    ctx = Context(
        at="forward", calibration=flat, slower=measured(rows), progress=progress or (lambda *_: None), known=kept.known,
        keep=kept.keep,
    )  # fmt: skip
    if limit is not None:
        plan = planned(exported.graph, one, ctx, limit, formats, microseconds(rows))
        return _finished(model, exported, plan.step, plan.done, chosen, flat, plan)
    step, done = run_pass(exported.graph, one, ctx)
    return _finished(model, exported, step, done, chosen, flat)


def what_if(
    model: Any,
    calib: Any,
    *,
    targets: Iterable[str] = ("Linear",),
    ignore: Iterable[str] = (),
    want: str = "faster",
    formats: Iterable[str] = FORMATS,
    rows: Iterable[int] = ROWS,
    dynamic_shapes: Any = None,
    examples: Any = None,
    samples: int | None = None,
    progress: Progress | None = None,
) -> WhatIf:
    """What each format would cost each layer: error (of rounding to nearest), bytes, microseconds; nothing is quantized.

    Arguments are those of `quantize`. Raises BadScheme, BadCalibration, NoLayerMatches, BadOption, and what `plait.compile`
    raises at capture.
    """
    one = pass_of(Scheme.of("rtn-w4g128"), targets, ignore, want, ())
    exported, flat = _captured(_loaded(model), calib, examples, samples, dynamic_shapes)
    rows = tuple(rows)
    ctx = Context(at="forward", calibration=flat, slower=measured(rows), progress=progress or (lambda *_: None))
    return tabled(exported.graph, one, ctx, tuple(formats), microseconds(rows))


def _loaded(model: Any) -> Any:
    return export(model) if isinstance(model, str | os.PathLike) else model


def _captured(
    model: Any, calib: Any, examples: Any, samples: int | None, dynamic_shapes: Any
) -> tuple[Exported, tuple[tuple[Any, ...], ...]]:
    """A model's graph, and the calibration batches as its flat inputs."""
    batches = calibration.batches(calib, argument_names(model), examples, samples)
    args, kwargs = batches[0] if examples is None else as_arguments(examples)
    exported = capture_model(model, kwargs if kwargs and not args else args, dynamic_shapes)
    return exported, calibration.flat_batches(batches, exported.in_tree, exported.held)


def pass_of(
    asked: Scheme,
    targets: Iterable[str],
    ignore: Iterable[str],
    want: str,
    layers: Iterable[str],
    constants_only: bool = False,
) -> Weights:
    """The pass that a scheme names. Raises BadOption for a `want` that there is not."""
    if want not in WANT:
        raise BadOption(name="want", expected=" or ".join(WANT), value=want)
    common: dict[str, Any] = {"targets": tuple(targets), "ignore": tuple(ignore), "want": want, "layers": tuple(layers)}
    form, makeup = asked.format, "gptq" in asked.method
    if form.dynamic:
        return W8a8(compensate=makeup, **common)
    common |= {"bits": form.bits, "group": form.group, "symmetric": form.symmetric, "compensate": makeup}
    return Awq(constants_only=constants_only, **common) if "awq" in asked.method else Rtn(**common)


def _finished(
    model: Any,
    exported: Exported,
    step: Step,
    done: Quantization,
    options: Options,
    calibrated: Batches,
    plan: Plan | None = None,
) -> QuantizedModel:
    skipped = tuple(Skipped(*reason.why.split(": ", 1)) for _, _, reason in step.refused if ": " in reason.why)
    return QuantizedModel(model, exported, step, done, skipped, options, calibrated, plan)
