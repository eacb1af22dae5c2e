"""Commands that compile and run models."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ..terminal import coverage_text, emit, fields, milliseconds, progress, size, table
from .shared import choices_of_passes, common, inputs_of_source, options_of, writable


@click.command("compile")
@click.argument("src")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False),
    callback=writable,
    help="The artifact to write  [default: NAME.plait].",
)
@click.option(
    "--target",
    default="cpu",
    show_default=True,
    metavar="TARGETS",
    help="Machines to build for: cpu (x86-64-v3 and -v4), cpu:x86-64-v3, cuda:90; several with commas.",
)
@click.option("--print-after", metavar="PASSES", help="Print the graph to stderr after these passes, or `all`.")
@click.option("--dump-dir", type=click.Path(file_okay=False), help="Write graphs, kernels and coverage to this folder.")
@click.option("--dry-run", is_flag=True, help="Show what would be generated; build and write nothing.")
@inputs_of_source
@choices_of_passes
@common
def compile_command(
    src: str, output: str | None, target: str, print_after: str | None, dump_dir: str | None, dry_run: bool,
    shapes: tuple[str, ...], dynamic: tuple[str, ...], seed: int, passes: tuple[str, ...], disabled: tuple[str, ...],
    settings: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Compile SRC into an artifact.

    \b
    plait compile encoder.pt2 -o encoder.plait
    plait compile models.vit:make --shape image=8x3x224x224 --dynamic image:0=1..32
    plait compile models.lm:make --disable-pass share --print-after all --dry-run
    """
    from ..aot import compile_source
    from ..source import load, parse_targets

    targets = parse_targets(target)
    options = options_of(passes, disabled, settings, print_after=print_after, dump_dir=dump_dir)
    with progress("loading"):
        source = load(src, shapes, dynamic, seed=seed)
    path = None if dry_run else output or default_output(src)
    with progress("compiling"):
        done = compile_source(source, options, path, targets)
    data = {
        "source": src,
        "artifact": path,
        "bytes": Path(path).stat().st_size if path else None,
        "seconds": {k: round(v, 3) for k, v in done.seconds.items()},
        "passes": [{"name": s.pass_name, "fired": dict(s.fired), "seconds": round(s.seconds, 4)} for s in done.history],
        "coverage": asdict(done.coverage),
        "device_coverage": {target: asdict(found) for target, found in done.device_coverage.items()},
    }

    def render() -> str:
        parts = [coverage_text(data["coverage"])]
        parts += [f"{target}: {coverage_text(found)}" for target, found in data["device_coverage"].items()]
        spent = ", ".join(f"{what} {milliseconds(t)}" for what, t in done.seconds.items())
        wrote = f"wrote {path} ({size(Path(path).stat().st_size)})" if path else "wrote nothing (dry run)"
        return "\n\n".join([*parts, f"{spent}\n{wrote}"])

    emit(data, as_json, render)


def default_output(src: str) -> str:
    """`models.vit:make` → `make.plait`, `dir/encoder.pt2` → `encoder.plait`, in the current folder."""
    return f"{Path(src).stem if src.endswith('.pt2') else src.rpartition(':')[2].rpartition('.')[2]}.plait"


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--inputs",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    help="One .npy for each input in order (repeat), or one .safetensors with their names.",
)
@click.option("--random", "at_random", is_flag=True, help="Draw random inputs.")
@click.option("--seed", default=0, show_default=True, help="Seed of random inputs.")
@click.option("--size", "sizes", multiple=True, metavar="SYMBOL=N", help="A dynamic size of random inputs.")
@click.option(
    "--compare",
    "reference",
    type=click.Choice(["eager", "graph"]),
    help="Compare with the model in eager (needs --source), or with the graph after the passes, run op by op.",
)
@click.option("--source", metavar="SRC", help="The model that the artifact was compiled from.")
@click.option("--rtol", type=float, help="Relative tolerance  [default: torch.testing's for the dtype].")
@click.option("--atol", type=float, help="Absolute tolerance  [default: torch.testing's for the dtype].")
@click.option("--repeat", type=click.IntRange(min=1), help="Time this many runs.")
@click.option("--save", type=click.Path(dir_okay=False), help="Write tensor results to this .safetensors file.")
@click.option(
    "--device", metavar="DEVICE", help="cpu, cuda or cuda:1  [default: a CUDA device that it was compiled for, else cpu]."
)
@common
def run(
    file: str, inputs: tuple[str, ...], at_random: bool, seed: int, sizes: tuple[str, ...], reference: str | None,
    source: str | None, rtol: float | None, atol: float | None, repeat: int | None, save: str | None, device: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Run an artifact. Exit code 1 where --compare finds a difference beyond the tolerances."""
    from torch.utils import _pytree as pytree

    from ...runtime.artifact import load
    from .. import running

    if at_random == bool(inputs):
        raise click.UsageError("give either --inputs or --random")
    if reference == "eager" and source is None:
        raise click.UsageError("--compare eager needs --source SRC; --compare graph does without")
    model = load(file, device)
    plan = model.executable.plan
    flat = running.random_inputs(plan, seed, _sizes(sizes, plan)) if at_random else running.read_inputs(inputs, plan)
    expected = _reference(reference, source, model, flat, file) if reference else None
    results = pytree.tree_leaves(model.executable(*flat))
    if save:
        running.write_results(results, save)
    data: dict[str, Any] = {"outputs": [running.describe(r) for r in results]}
    if repeat:
        data["seconds"] = running.median_seconds(lambda: model.executable(*flat), repeat, model.device)
    compared = [] if expected is None else running.compare(results, expected, rtol=rtol, atol=atol)
    if expected is not None:
        data["reference"] = reference
        data["comparison"] = [c.as_json() for c in compared]

    def render() -> str:
        lines = [f"output {i}: {fields_inline(d)}" for i, d in enumerate(data["outputs"])]
        if repeat:
            lines.append(f"median of {repeat} runs: {milliseconds(data['seconds'])}")
        if compared:
            rows = [
                ("equal" if c.equal else "DIFFERS", c.output, f"{c.max_abs:.3g}", f"{c.relative:.3g}", c.note)
                for c in compared
            ]
            lines += ["", f"against {reference}:", table(("", "output", "largest difference", "relative", ""), rows)]
        return "\n".join(lines)

    emit(data, as_json, render)
    sys.exit(0 if all(c.equal for c in compared) else 1)


def fields_inline(data: dict[str, Any]) -> str:
    """A result's description on one line."""
    numbers = [f"{k} {data[k]:.6g}" for k in ("min", "mean", "max") if k in data]
    shown = ", ".join(f"{x:.6g}" if isinstance(x, float) else str(x) for x in data.get("first", [data.get("value")]))
    return "  ".join([data["kind"], *numbers, f"[{shown}, …]" if "first" in data else shown])


def _sizes(texts: tuple[str, ...], plan: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    known = [s.name for s in plan.symbols]
    for text in texts:
        name, _, value = text.partition("=")
        if not value.isdigit():
            raise click.BadParameter(f"write SYMBOL=N, not {text!r}", param_hint="--size")
        if name not in known:
            raise click.BadParameter(f"no size is called {name!r}, only {', '.join(known) or 'none'}", param_hint="--size")
        found[name] = int(value)
    return found


def _reference(kind: str, source: str | None, model: Any, flat: list[Any], file: str) -> list[Any]:
    from .. import running

    if kind == "graph" or source is None:
        return running.call_graph(file, model, flat)
    from ..source import load as load_source

    return running.call_reference(load_source(source).eager(), model, flat)


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("--graph", "level", metavar="LEVEL", help="Print a graph: captured, tensor (after the passes) or plan.")
@click.option("--kernels", is_flag=True, help="Print the kernels' sources.")
@click.option("--coverage", is_flag=True, help="Print what runs in torch, and why.")
@click.option("--target", metavar="TARGET", help="Which plan or coverage to print, such as cuda:90  [default: the first].")
@common
def inspect(
    file: str, level: str | None, kernels: bool, coverage: bool, target: str | None, as_json: bool
) -> None:  # fmt: skip
    """Show what an artifact holds."""
    from .. import inspection

    if level:
        text = inspection.graph(file, level, target)
        emit({"level": level, "text": text}, as_json, lambda: text)
    elif kernels:
        sources = inspection.kernels(file)
        emit(sources, as_json, lambda: "\n".join(f"// ==== {name}\n{text}" for name, text in sources.items()))
    elif coverage:
        found = inspection.coverage(file, target)
        emit(found, as_json, lambda: coverage_text(found))
    else:
        summary = inspection.summary(file)
        shown = {**summary, "bytes": size(summary["bytes"]), "weight_bytes": size(summary["weight_bytes"])}
        emit(summary, as_json, lambda: fields(shown))


@click.command()
@click.argument("src")
@inputs_of_source
@choices_of_passes
@common
def explain(
    src: str, shapes: tuple[str, ...], dynamic: tuple[str, ...], seed: int, passes: tuple[str, ...],
    disabled: tuple[str, ...], settings: tuple[str, ...], as_json: bool,
) -> None:  # fmt: skip
    """Show what torch.compile(SRC, backend="plait") makes of a call: graphs, graph breaks, what runs where and why."""
    from ..api import explain as explain_call
    from ..source import load

    with progress("loading"):
        source = load(src, shapes, dynamic, seed=seed)
    with progress("compiling"):
        found = explain_call(source.eager(), options=options_of(passes, disabled, settings))(*source.inputs)
    data = {
        "graphs": [
            {"name": r.name, "kind": r.kind, "coverage": asdict(r.coverage), "not_applied": list(r.not_applied)}
            for r in found.graphs
        ],
        "breaks": [asdict(b) for b in found.breaks],
    }
    emit(data, as_json, lambda: str(found))


@click.command()
@click.option(
    "--out", default="plait-demo", show_default=True, type=click.Path(file_okay=False), help="Where to leave files."
)
@click.option("--inductor/--no-inductor", default=True, show_default=True, help="Compare with Inductor too.")
@click.option("--seconds", default=4.0, show_default=True, help="Time to spend on each timing.")
@common
def demo(out: str, inductor: bool, seconds: float, as_json: bool) -> None:
    """Compile a pretrained sentence encoder ahead of time, load it in another process, compare times and answers."""
    from ..demo import run as run_demo

    data = run_demo(out, inductor=inductor, seconds=seconds, say=(lambda _: None) if as_json else click.echo)
    if as_json:
        emit(data, True, str)
