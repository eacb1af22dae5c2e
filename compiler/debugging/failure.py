"""What is wrong with a compiled program, in a form that tells one failure from another."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import PlaitError

KINDS = ("wrong", "raises", "crashes")
#: Two wrong answers are the same failure while their errors are this close, in powers of ten.
BAND = 2


@dataclass(frozen=True)
class Failure:
    """A failure and its signature.

    `kind` is "wrong" (a result too far from float64), "raises" or "crashes" (the process died). `what` is the result, or the
    error's code or class; `op` the op it was found at, "" where none is known; `band` the size of a wrong answer's error, as
    a power of ten of what is allowed.
    """

    kind: str
    what: str
    op: str = ""
    band: int = 0
    detail: str = ""

    def same(self, other: Failure | None) -> bool:
        """Whether `other` is this failure: same kind, same error, same op where both know it, error of like size.

        A smaller program may name its results otherwise, so the name of a wrong result is not compared."""
        if other is None or self.kind != other.kind or (self.op and other.op and self.op != other.op):
            return False
        if self.kind == "wrong":
            return abs(self.band - other.band) <= BAND
        return self.what == other.what

    def __str__(self) -> str:
        at = f" at {self.op}" if self.op else ""
        return (
            f"{self.what} {self.kind}{at}: {self.detail}"
            if self.kind == "wrong"
            else f"{self.kind} {self.what}{at}: {self.detail}"
        )


def of_error(error: BaseException) -> Failure:
    """The failure that an exception is: plait's errors by their code and the op that they name, others by their class."""
    detail = str(error).split("\n")[0]
    if isinstance(error, PlaitError):
        return Failure("raises", error.code, str(error.fields.get("op", "")), detail=detail)
    return Failure("raises", type(error).__name__, detail=detail)
