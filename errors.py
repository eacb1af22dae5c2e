"""The catalogue of errors: one class per mistake, each with a stable code, a message in the user's words and a way out."""

from __future__ import annotations

from typing import ClassVar


class PlaitError(Exception):
    """Base of all plait errors. `code` is stable; `message` is formatted with the keyword arguments; `fix` says the way out."""

    code: ClassVar[str] = "P0000"
    message: ClassVar[str] = "{detail}"
    fix: ClassVar[str] = ""

    def __init__(self, *, source: str | None = None, **fields: object) -> None:
        self.fields = fields
        self.source = source
        text = f"[{self.code}] " + self.message.format(**fields)
        if source:
            text += f"\n  at {source}"
        if self.fix:
            text += f"\n  way out: {self.fix.format(**fields)}"
        super().__init__(text)


def catalogue() -> tuple[type[PlaitError], ...]:
    """Every error class, ordered by code."""
    found: list[type[PlaitError]] = []
    todo = [PlaitError]
    while todo:
        for sub in todo.pop().__subclasses__():
            found.append(sub)
            todo.append(sub)
    return tuple(sorted(found, key=lambda c: c.code))
