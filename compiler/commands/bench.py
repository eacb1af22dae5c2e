"""The command that times a model beside its peers and shows where its time goes."""

from __future__ import annotations

import sys
from typing import Any

import click

from ..terminal import coverage_text, emit, progress, table
from .shared import choices_of_passes, common, inputs_of_source, options_of, writable


@click.command()
@click.argument("src")
@click.option(
    "--peer",
    "peers",
    multiple=True,
    default=("eager,inductor",),
    show_default=True,
    metavar="NAMES",
    help="What to compare with: eager, inductor, openvino, onnxruntime; several with commas or by repeating.",
)
@click.option("--profile", "profiled", is_flag=True, help="Show the time of each kernel and call beside what it could be.")
@click.option(
    "--report",
    type=click.Path(dir_okay=False),
    callback=writable,
    help="Write an HTML page with the profile, what runs where, passes and kernels.",
)
@click.option(
    "--trace",
    "timeline",
    type=click.Path(dir_okay=False),
    callback=writable,
    help="Write a timeline of one call as a Chrome trace, which Perfetto opens.",
)
@click.option("--seconds", default=4.0, show_default=True, help="Time to spend on timing, and on a profile.")
@inputs_of_source
@choices_of_passes
@common
def bench(
    src: str, peers: tuple[str, ...], profiled: bool, report: str | None, timeline: str | None, seconds: float,
    shapes: tuple[str, ...], dynamic: tuple[str, ...], seed: int, passes: tuple[str, ...], disabled: tuple[str, ...],
    settings: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Time SRC through plait and through peers, by turns in one process. Exit code 1 where plait's answer differs.

    \b
    plait bench models.vit:make --peer eager,openvino,onnxruntime
    plait bench models.vit:make --profile --report vit.html
    """
    from ..bench import bench as measure
    from ..peers import Task, chosen
    from ..source import load

    wanted = chosen(name.strip() for text in peers for name in text.split(",") if name.strip())
    with progress("loading"):
        source = load(src, shapes, dynamic, seed=seed)
    task = Task(source.model, source.inputs, dynamic_shapes=source.dynamic_shapes)
    with progress("compiling and timing"):
        data, model = measure(task, wanted, options_of(passes, disabled, settings), seconds=seconds)
    data = {"source": src, **data}
    profile = None
    if profiled or report:
        with progress("profiling"):
            profile = model.profile(*source.inputs, seconds=seconds)
        data["profile"] = profile.as_json()
    if report:
        model.report(report, profile)
        data["report"] = report
    if timeline:
        model.trace(timeline, *source.inputs)
        data["trace"] = timeline

    def render() -> str:
        parts = [_times(data), coverage_text(data["coverage"])]
        parts += [str(profile)] if profile is not None else []
        parts += [f"wrote {path}" for path in (report, timeline) if path]
        return "\n\n".join(parts)

    emit(data, as_json, render)
    sys.exit(0 if data["contenders"]["plait"]["difference"]["equal"] else 1)


def _times(data: dict[str, Any]) -> str:
    head = ("", "ms per call", "10th to 90th", "times plait", "compile s", "difference from eager", "how")
    rows = []
    for name, found in data["contenders"].items():
        ms, times, gap = found["milliseconds"], found["times_plait"], found["difference"]
        differs = "" if gap["equal"] else " DIFFERS"
        rows.append((
            name, f"{ms['median']:.3f}", f"{ms['p10']:.3f} to {ms['p90']:.3f}", f"{times['median']:.2f}",
            f"{found['compile_seconds']:.1f}", f"{gap['max_abs']:.2g}{differs}", found["settings"],
        ))  # fmt: skip
    return f"{table(head, rows)}\n\nmedians of {data['rounds']} rounds by turns, threads: {data['threads']}"
