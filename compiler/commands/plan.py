"""`plait plan`."""

from __future__ import annotations

import json
from math import inf
from pathlib import Path
from typing import Any

import click

from ..terminal import emit, progress_bar
from .shared import bytes_of, common, writable

_FILE = click.Path(dir_okay=False)
_COUNT = click.IntRange(min=1)


def _kept(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    return value if value is None or Path(value).exists() else writable(ctx, param, value)


def _picture(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and Path(value).suffix.lower() not in (".svg", ".html"):
        raise click.BadParameter(f"the name must end in .svg or .html, not {value!r}")
    return writable(ctx, param, value)


@click.command()
@click.argument("src")
@click.option("--devices", type=_COUNT, required=True, help="How many devices there are.")
@click.option("--global-batch", "batch", type=_COUNT, required=True, help="Samples of a step, over all devices.")
@click.option(
    "--memory",
    callback=bytes_of,
    metavar="SIZE",
    help="Memory of a device: 80GB, 80GiB, 0.5TB  [default: as much as it takes].",
)
@click.option(
    "--profile",
    "profiled",
    type=_FILE,
    callback=_kept,
    metavar="FILE.json",
    help="What SRC's layers cost: read if there is such a file, else measured and written there.",
)
@click.option(
    "--schedule",
    "schedules",
    multiple=True,
    type=click.Choice(["1f1b", "gpipe", "zero-bubble", "bidirectional"]),
    help="Schedules of micro-batches to choose from (repeat)  [default: 1f1b; bidirectional for two backbones].",
)
@click.option("--stages", type=_COUNT, help="Exactly so many stages.")
@click.option("--microbatches", type=_COUNT, help="Exactly so many micro-batches in each pipeline.")
@click.option("--groups", type=_COUNT, help="Exactly so many pipelines beside each other.")
@click.option(
    "--cut", "cuts", multiple=True, metavar="LAYER", help="A layer that a stage begins with (repeat): these alone."
)
@click.option(
    "--replicas",
    type=click.Choice(["any", "equal"]),
    default="any",
    show_default=True,
    help="Whether stages may have different numbers of devices.",
)
@click.option("--no-fill", is_flag=True, help="Leave bubbles empty: frozen layers run behind the step.")
@click.option("--no-partial", is_flag=True, help="Put frozen layers into bubbles with all of their rows only.")
@click.option(
    "--least-bubble",
    "least",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    metavar="MS",
    help="Leave bubbles empty that are not longer, in milliseconds.",
)
@click.option(
    "--trace",
    "traced",
    type=_FILE,
    callback=writable,
    metavar="FILE.json",
    help="Write the predicted step as a Chrome trace, which Perfetto opens.",
)
@click.option(
    "--timeline",
    "drawn",
    type=_FILE,
    callback=_picture,
    metavar="FILE.svg|.html",
    help="Draw the predicted step, as a picture or as a page with the plan's tables.",
)
@click.option("-o", "--output", type=_FILE, callback=writable, metavar="FILE.json", help="Write what --json prints.")
@common
def plan(
    src: str, devices: int, batch: int, memory: float | None, profiled: str | None, schedules: tuple[str, ...],
    stages: int | None, microbatches: int | None, groups: int | None, cuts: tuple[str, ...], replicas: Any, no_fill: bool,
    no_partial: bool, least: float, traced: str | None, drawn: str | None, output: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Choose how to train SRC on so many devices: pipeline stages, micro-batches, what fills the bubbles.

    SRC is a profile, `file.json` (docs/stages.md), or `package.module:factory`, a function that returns model, loss and
    batch as `plait.staged_step` takes them. Nothing is trained, and no device but this machine's is needed.

    \b
        plait plan unet.json --devices 8 --memory 80GB --global-batch 256
        plait plan unet.json --devices 8 --global-batch 256 --schedule 1f1b --schedule zero-bubble --timeline unet.html
        plait plan models.unet:make --devices 8 --memory 80GB --global-batch 256 --profile unet.json -o plan.json
    """
    from ...passes.stages.plan import Filler
    from ...passes.stages.plan import plan as best
    from ..stages import timeline
    from ..stages.request import cuts_of, profile_from, schedules_of
    from ..stages.summary import Summary
    from ..tracing import write

    if src.endswith(".json") and profiled:
        raise click.UsageError("SRC is a profile itself: leave --profile out")
    if cuts and stages is not None and stages != len(cuts) + 1:
        raise click.UsageError(f"--stages {stages} and {len(cuts)} of --cut contradict each other: leave one out")
    with progress_bar("planning") as told:
        profile = profile_from(src, profiled, told)
        found = best(
            profile,
            devices,
            batch,
            memory=inf if memory is None else memory,
            schedules=schedules_of(profile, schedules),
            replicas=replicas,
            cuts=cuts_of(profile, cuts) if cuts else None,
            stage_counts=None if stages is None else (stages,),
            microbatch_counts=None if microbatches is None else (microbatches,),
            groups=None if groups is None else (groups,),
            filler=Filler(not no_fill, not no_partial, 1e-3 * least),
            progress=told,
        )
        summary = Summary(found)
        data = {"source": src, **summary.as_json()}
    if traced:
        write(traced, timeline.trace(found))
    if drawn:
        timeline.write(found, drawn)
    if output:
        Path(output).write_text(json.dumps(data, indent=1), encoding="utf-8")
    wrote = [path for path in (output, traced, drawn) if path]
    emit(data, as_json, lambda: "\n\n".join([str(summary), *([f"wrote {', '.join(wrote)}"] if wrote else [])]))
