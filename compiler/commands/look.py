"""Commands that only look: environment, passes, differences."""

from __future__ import annotations

import difflib
import sys

import click

from ..terminal import emit, fields
from .shared import common


@click.command()
@common
def env(as_json: bool) -> None:
    """Show versions, processor, compiler, devices and cache: what to paste into a bug report."""
    from ..env import environment

    found = environment()
    emit(found, as_json, lambda: fields(found))


@click.command()
@common
def passes(as_json: bool) -> None:
    """List the passes with their options."""
    from ...passes import PASSES, registry

    found = [
        {
            "name": name,
            "summary": registry.summary(cls),
            "at": cls.at,
            "options": [
                {"name": o.name, "type": o.type, "required": o.required, "doc": o.doc}
                | ({} if o.required else {"default": o.default})
                for o in registry.describe(cls)
            ],
        }
        for name, cls in sorted(PASSES.items())
    ]

    def render() -> str:
        lines: list[str] = []
        for one in found:
            lines.append(f"{one['name']}  ({one['at']})  {one['summary']}")
            for o in one["options"]:
                default = "must be given" if o["required"] else f"default {o['default']}"
                lines.append(f"    {o['name']}: {o['type']}, {default}. {o['doc']}")
        return "\n".join(lines)

    emit(found, as_json, render)


@click.command()
@click.argument("a", type=click.Path(exists=True, dir_okay=False))
@click.argument("b", type=click.Path(exists=True, dir_okay=False))
@click.option("--graph", "level", default=None, metavar="LEVEL", help="Compare this level of two artifacts [default: all].")
@common
def diff(a: str, b: str, level: str | None, as_json: bool) -> None:
    """Compare two artifacts, or two text dumps of graphs. Exit code 1 where they differ."""
    from ..inspection import comparable

    old, new = comparable(a, level), comparable(b, level)
    parts: dict[str, list[str]] = {}
    for name in dict.fromkeys((*old, *new)):
        before, after = old.get(name, "").splitlines(), new.get(name, "").splitlines()
        lines = list(difflib.unified_diff(before, after, f"{a}:{name}", f"{b}:{name}", lineterm=""))
        if lines:
            parts[name] = lines
    emit(
        {"equal": not parts, "differences": parts},
        as_json,
        lambda: "\n".join(line for lines in parts.values() for line in lines) or "no differences",
    )
    sys.exit(1 if parts else 0)
