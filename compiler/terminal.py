"""What commands print: results on stdout as text or JSON, progress on stderr only where somebody watches."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click


def emit(data: Any, as_json: bool, render: Callable[[], str]) -> None:
    """Print a result: `data` as JSON, or the text that `render` makes."""
    click.echo(json.dumps(data, indent=1, sort_keys=False, default=str) if as_json else render().rstrip("\n"))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows in aligned columns; numbers to the right."""
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    right = [bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def fields(data: Mapping[str, object]) -> str:
    """One `name  value` line for each field; nested mappings are indented, empty values left out."""
    width = max(map(len, data), default=0)
    lines: list[str] = []
    for name, value in data.items():
        if isinstance(value, Mapping):
            lines += [name, *("  " + line for line in fields(value).splitlines())] if value else []  # pyright: ignore
        elif isinstance(value, list | tuple):
            lines += [f"{name.ljust(width)}  {', '.join(map(str, value))}"] if value else []  # pyright: ignore
        elif value is not None:
            lines.append(f"{name.ljust(width)}  {value}")
    return "\n".join(lines)


def milliseconds(seconds: float) -> str:
    """A duration as people read it: 12.3 ms, 4.56 s."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def size(count: int) -> str:
    """Bytes as people read them: 512 B, 1.5 MiB."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Show that something takes a while, on stderr, where that is a terminal."""
    if not _watched():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show how far something is, on stderr, where that is a terminal: what is given takes (done, of, name of the last)."""
    if not _watched():
        yield lambda *_: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[last]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=None, last="")
        yield lambda done, of, last: shown.update(task, completed=done, total=of, last=last)


def _watched() -> bool:
    return sys.stderr.isatty() and not os.environ.get("CI")


def coverage_text(coverage: Mapping[str, Any]) -> str:
    """What runs the nodes of a model: counts, then what is left to torch and why, most frequent first."""
    lines = [
        f"{coverage['generated']} nodes in {coverage['launches']} generated kernels, {coverage['library']} library calls, "
        f"{coverage['fallback']} fallbacks, {coverage['free']} free (views, constants)"
    ]
    counts: dict[tuple[str, str, str], list[str]] = {}
    for node in coverage.get("reported", ()):
        counts.setdefault((node["kind"], node["op"], node["reason"]), []).append(node.get("source", ""))
    rows = [
        (len(sources), kind, op, reason, next(filter(None, sources), ""))
        for (kind, op, reason), sources in sorted(counts.items(), key=lambda kv: (kv[0][0], -len(kv[1]), kv[0]))
    ]
    return "\n".join([*lines, "", table(("count", "kind", "op", "why", "first at"), rows)] if rows else lines)
