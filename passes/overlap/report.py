"""What the overlap passes have to say: which range of each MoE layer was cut how, and what runs beside which exchange."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """One MoE layer: where it is in the user's program, the nodes of its range, the number of pieces and what is cut ("" for
    one piece), estimated seconds of the range whole and cut, estimates by number of pieces, why it is not cut further, how
    many layers the range holds."""

    source: str
    first: str
    last: str
    nodes: int
    pieces: int
    axis: str
    whole: float
    cut: float
    tried: tuple[tuple[int, float], ...]
    why: str
    layers: int = 1

    def __str__(self) -> str:
        where = self.source or self.first
        if self.pieces == 1:
            return f"{where}: whole ({1e3 * self.whole:.2f} ms); {self.why}"
        gain = f"{1e3 * self.whole:.2f} -> {1e3 * self.cut:.2f} ms"
        shared = f", {self.layers} layers" if self.layers > 1 else ""
        nodes = f"{self.first} to {self.last} ({self.nodes} nodes{shared})"
        return f"{where}: {self.pieces} pieces along {self.axis}, {nodes}, {gain}; {self.why}"


@dataclass(frozen=True)
class ChunksReport:
    """What `overlap-chunks` chose for each MoE layer, and seconds that a step was expected to take by plan."""

    layers: tuple[LayerReport, ...]
    steps: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        lines = [*map(str, self.layers)] or ["no MoE layer was found"]
        if len(self.steps) > 1:
            lines.append("step: " + ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in self.steps))
        return "\n".join(lines)


@dataclass(frozen=True)
class WeightsReport:
    """What `overlap-dw` placed beside each exchange, and estimates for the whole step: seconds, seconds of communication
    that nothing is computed behind, peak bytes."""

    exchanges: tuple[str, ...]
    beside: tuple[tuple[str, ...], ...]
    seconds_before: float
    seconds_after: float
    exposed_before: float
    exposed_after: float
    peak_before: int
    peak_after: int

    def __str__(self) -> str:
        lines = [f"{where or 'an exchange'}: {', '.join(works) or 'nothing'}"
                 for where, works in zip(self.exchanges, self.beside, strict=True)]  # fmt: skip
        lines.append(
            f"step {1e3 * self.seconds_before:.2f} -> {1e3 * self.seconds_after:.2f} ms, communication that nothing hides "
            f"{1e3 * self.exposed_before:.2f} -> {1e3 * self.exposed_after:.2f} ms, peak "
            f"{self.peak_before / 1e6:.1f} -> {self.peak_after / 1e6:.1f} MB"
        )
        return "\n".join(lines)


__all__ = ["ChunksReport", "LayerReport", "WeightsReport"]
