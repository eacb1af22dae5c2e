"""`plait quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ...errors import CannotResume, PlaitError
from ..terminal import coverage_text, emit, milliseconds, progress, progress_bar, size
from .models import default_output
from .shared import choices_of_passes, common, inputs_of_source, options_of, writable

_FILE = click.Path(dir_okay=False)
_FOLDER = click.Path(file_okay=False)


def _rows(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[int, ...]:
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"write numbers with commas such as 1,16,128, not {value!r}")
    return tuple(map(int, parts))


@click.command()
@click.argument("src")
@click.option("-o", "--output", type=_FILE, callback=writable, help="The artifact to write  [default: NAME.plait].")
@click.option(
    "--scheme",
    default="awq-w4g128",
    show_default=True,
    metavar="SCHEME",
    help="METHOD-FORMAT: rtn, awq, gptq or awq+gptq; w4g128 is 4 bits, groups of 128, w8-sym 8 bits, rows, no "
    "zero points. Or w8a8.",
)
@click.option(
    "--calib",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Calibration data: .safetensors or .npz with a tensor for each input, by names, first axis samples; .npy "
    "with the only one; .pt with a list of inputs. rtn and w8a8 without a budget look at the example inputs if "
    "there is none.",
)
@click.option("--samples", type=click.IntRange(min=1), help="Take the first so many samples (batches of a .pt) only.")
@click.option(
    "--budget",
    metavar="error=X|bytes=N",
    help="Choose a format for each layer: error=0.05 (relative, of the results), bytes=40MB or bytes=30%.",
)
@click.option(
    "--format",
    "formats",
    multiple=True,
    metavar="FORMAT",
    help="What a budget or --table chooses from (repeat)  [default: w3g128, w4g128, w4g32, w8g128, float].",
)
@click.option(
    "--target-layers",
    "--targets",
    "targets",
    multiple=True,
    metavar="LAYER",
    help="Layers to quantize (repeat): names, their last parts, or re:EXPRESSION  [default: all linear ones].",
)
@click.option("--ignore", multiple=True, metavar="LAYER", help="Layers to leave float (repeat), written likewise.")
@click.option(
    "--layer",
    "layers",
    multiple=True,
    metavar="LAYER=FORMAT",
    help="The format of some layers (repeat; the first that matches holds), without a budget.",
)
@click.option(
    "--want",
    type=click.Choice(["faster", "smaller", "any"]),
    default="faster",
    show_default=True,
    help="Leave layers float that would not become faster (measured here), or smaller; any: take all.",
)
@click.option(
    "--rows",
    default="1,16,128",
    show_default=True,
    callback=_rows,
    metavar="N,N",
    help="Rows of input (tokens) that layers are timed on.",
)
@click.option(
    "--table",
    "table_only",
    is_flag=True,
    help="Print what each format would cost each layer (error, bytes, microseconds); write nothing.",
)
@click.option(
    "--target",
    default="cpu",
    show_default=True,
    metavar="TARGETS",
    help="Machines to build for: cpu (x86-64-v3 and -v4), cpu:x86-64-v3, cuda:90; several with commas.",
)
@click.option(
    "--resume",
    type=_FOLDER,
    metavar="FOLDER",
    help="Where finished layers are kept, so that the same command goes on after an interruption  [default: "
    "OUTPUT.partial, removed when all is written].",
)
@click.option("--no-resume", is_flag=True, help="Keep no finished layers.")
@click.option("--export-awq", type=_FOLDER, metavar="FOLDER", help="Write a checkpoint as AutoAWQ does, too.")
@click.option("--export-compressed", type=_FOLDER, metavar="FOLDER", help="Write a compressed-tensors checkpoint, too.")
@click.option("--report", "page", type=_FILE, callback=writable, metavar="FILE", help="Write an HTML page, too.")
@inputs_of_source
@choices_of_passes
@common
def quantize(
    src: str, output: str | None, scheme: str, calib: str | None, samples: int | None, budget: str | None,
    formats: tuple[str, ...], targets: tuple[str, ...], ignore: tuple[str, ...], layers: tuple[str, ...], want: str,
    rows: tuple[int, ...], table_only: bool, target: str, resume: str | None, no_resume: bool, export_awq: str | None,
    export_compressed: str | None, page: str | None, shapes: tuple[str, ...], dynamic: tuple[str, ...], seed: int,
    passes: tuple[str, ...], disabled: tuple[str, ...], settings: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Hold the weights of SRC's linear layers in a few bits, and compile it into an artifact.

    \b
    plait quantize models.lm:make --calib tokens.safetensors -o lm.plait
    plait quantize models.lm:make --calib tokens.safetensors --budget error=0.05 --ignore lm_head --report lm.html
    plait quantize models.lm:make --calib tokens.safetensors --table
    """
    from ...passes.quantize.scheme import Scheme
    from ..quantize import api, driver
    from ..quantize.resume import beside, finished
    from ..source import load, parse_targets

    if resume and no_resume:
        raise click.UsageError("give either --resume or --no-resume")
    written = {"--budget": budget, "-o": output, "--resume": resume, "--layer": layers, "--report": page,
               "--export-awq": export_awq, "--export-compressed": export_compressed}  # fmt: skip
    if table_only and any(written.values()):
        given = ", ".join(name for name, value in written.items() if value)
        raise click.UsageError(f"--table writes and chooses nothing: leave {given} out")
    needs = "--table" if table_only else "--budget" if budget else scheme if Scheme.of(scheme).needs_data else ""
    if calib is None and needs:
        raise click.UsageError(f"{needs} needs calibration data: give --calib FILE (rtn and w8a8 alone do without)")
    built_for = parse_targets(target)
    how: dict[str, Any] = {
        "targets": targets or ("Linear",), "ignore": ignore, "want": want, "rows": rows, "samples": samples,
        "formats": formats or api.FORMATS,
    }  # fmt: skip
    with progress("loading"):
        source = load(src, shapes, dynamic, seed=seed)
    if table_only:
        with progress_bar("measuring") as told:
            found = api.what_if(source.model, calib, examples=source.inputs, dynamic_shapes=source.dynamic_shapes,
                                progress=told, **how)  # fmt: skip
        emit({"source": src, "calibration": calib, "options": found.as_json()}, as_json, lambda: str(found))
        return
    path = output or default_output(src)
    keep = None if no_resume else Path(resume) if resume else beside(path)
    try:
        with progress_bar("quantizing") as told:
            made = driver.quantize_source(
                source, calib or [source.inputs], driver.Outputs(path, built_for, export_awq, export_compressed, page), keep,
                told, scheme=scheme, budget=budget, layers=layers, constants_only=bool(export_awq or export_compressed),
                options=options_of(passes, disabled, settings), **how,
            )  # fmt: skip
    except (PlaitError, KeyboardInterrupt) as error:
        if keep is not None and finished(keep) and not isinstance(error, CannotResume):
            click.echo(f"finished layers are kept in {keep}: the same command goes on from there", err=True)
        raise
    files = {"artifact": path, "checkpoints": [f for f in (export_awq, export_compressed) if f], "report": page}
    data = {"source": src, "scheme": scheme, "budget": budget, "calibration": calib, **files, **made.as_json()}
    data["artifact_bytes"] = Path(path).stat().st_size

    def render() -> str:
        seen = f"{data['batches']} batch{'es' * (data['batches'] != 1)} of {calib or 'the example inputs'}"
        error = f"error of the results: {made.error:.3g} (relative, root mean square, on {seen})"
        chosen = f"; chosen for {budget}" if budget else ""
        parts = [f"{made.model}\n{error}{chosen}", coverage_text(data["coverage"])]
        parts += [f"{name}: {coverage_text(found)}" for name, found in data["device_coverage"].items()]
        spent = ", ".join(f"{what} {milliseconds(t)}" for what, t in made.seconds.items())
        wrote = [f"wrote {path} ({size(data['artifact_bytes'])})", *files["checkpoints"], *([page] if page else [])]
        return "\n\n".join([*parts, f"{spent}\n{', '.join(wrote)}"])

    emit(data, as_json, render)
