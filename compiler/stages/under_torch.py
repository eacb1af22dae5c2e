"""Compiled stages under the schedules of `torch.distributed.pipelining`, zero-bubble ones included.

torch cuts a backward in two by walking autograd's graph, which compiled code does not show, and so refuses compiled modules
under zero-bubble schedules. Here the two halves were compiled apart.

stages = plait.torch_stages(model, loss, microbatch, count=4, group=group)       # those of this rank
schedule = ScheduleInterleavedZeroBubble(stages, n_microbatches=8, loss_fn=plait.stage_loss)
schedule.step(target=y, x=x, y=y)      # every rank passes the whole batch as keyword arguments, named as in `microbatch`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

from ...errors import CannotStage
from ...ir import TensorType
from ...passes.stages.stages import Cutting
from ..export import name_of
from ..options import Options
from ..pipelines import Session
from .capture import capture
from .programs import Backward, Trained, laid
from .reseed import mixed
from .staged import Staged, staged


def torch_stages(
    model: torch.nn.Module,
    loss: Callable[..., torch.Tensor],
    microbatch: Mapping[str, torch.Tensor],
    count: int,
    *,
    indices: Sequence[int] | None = None,
    group: Any = None,
    begin: Sequence[str] = (),
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> list[PipelineStage]:
    """The stages of a model that this rank holds, for a schedule of `torch.distributed.pipelining`.

    `loss(model, **microbatch)` gives the mean loss of a micro-batch. `indices` are the stages of this rank (by default every
    `size`-th one). Gradients land in `p.grad`, scaled by the schedule. Raises CannotStage, LossIsNoScalar, and what
    capturing raises.
    """
    names = tuple(microbatch)

    def positional(m: torch.nn.Module, *values: torch.Tensor) -> torch.Tensor:
        return loss(m, **dict(zip(names, values, strict=True)))

    captured = capture(model, positional, tuple(microbatch.values()))
    cutting = Cutting.of(captured.graph, captured.trained, frozen=False)
    found = staged(captured, cutting, cutting.at_modules(begin) if begin else cutting.balanced(count))
    if len(found.stages) != count:
        way = f"pass {count - 1} modules as `begin`"
        raise CannotStage(why=f"{len(found.stages)} stages were named, and {count} asked for", way=way)
    session = Session(name_of(model), Options.of(options))
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    mine = range(rank, count, size) if indices is None else indices
    device = next(model.parameters()).device
    made: list[PipelineStage] = []
    for s in mine:
        program = found.program(session, found.stages[s], 1.0)
        assert isinstance(program, Trained)
        made.append(_Stage(found, s, program, names, device, group, seed))
    return made


def stage_loss(output: Any, _target: Any = None) -> Any:
    """The loss function of a schedule over these stages: the last one gives the loss itself."""
    return output.sum()


class _Held(torch.nn.Module):
    """The parameters of a stage, so that schedules find them."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.held = torch.nn.ParameterList(parameters)


class _Stage(PipelineStage):
    def __init__(
        self, cut: Staged, index: int, program: Trained, names: tuple[str, ...], device: Any, group: Any, seed: int
    ) -> None:
        self.cut, self.program, self.names, self.seed = cut, program, names, seed
        region = cut.stages[index]
        self.came = cut.crossing[index - 1] if index else ()
        self.goes = cut.crossing[index] if index + 1 < len(cut.stages) else (cut.loss,)
        self.parts: Backward | None = None
        self.saved: dict[int, Any] = {}
        self.given: dict[int, dict[int, torch.Tensor]] = {}
        self.steps = 0
        held = [cut.state[n] for n in region.reads if n in cut.state and n in cut.gradients]
        super().__init__(
            _Held(held), index, len(cut.stages), device, group=group,
            input_args=tuple(self._example(n) for n in self.came), output_args=tuple(self._example(n) for n in self.goes),
        )  # fmt: skip

    def _example(self, n: int) -> torch.Tensor:
        kind = self.cut.types[n]
        assert isinstance(kind, TensorType)
        shape: Any = kind.shape
        return torch.empty(shape, dtype=kind.dtype, device=kind.device).requires_grad_(n in self.cut.gradients)

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        """Run the stage's forward on a micro-batch."""
        came = dict(zip(self.came, self._retrieve_recv_activations(fwd_chunk_id) if self.came else (), strict=True))
        given = kwargs or {}
        region = self.cut.stages[self.stage_index]
        inputs: list[Any] = []
        for n in region.reads:
            if n in self.cut.state:
                inputs.append(self.cut.state[n])
            elif n in self.cut.leaves:
                inputs.append(laid(given[self.names[self.cut.leaves[n]]], self.cut.types[n]))
            else:
                inputs.append(laid(came[n], self.cut.types[n]))
        if self.program.draws:
            if fwd_chunk_id == 0:
                self.steps += 1
            inputs.append(torch.tensor(mixed(self.seed, self.steps, fwd_chunk_id), dtype=torch.int64))
        results = self.program.forward.run([x.detach() if isinstance(x, torch.Tensor) else x for x in inputs])
        values = {**came, **dict(zip(region.gives, results[: self.program.outputs], strict=True))}
        self.saved[fwd_chunk_id] = list(results[self.program.outputs :])
        for buffer, value in self.cut.writes:
            if value in values and value in region.gives:
                self.cut.state[buffer].copy_(values[value])
        outputs = tuple(values[n].detach() for n in self.goes)
        if self.is_last:
            row = outputs[0].reshape(1)  # schedules join the results of micro-batches along their rows
            if save_forward_output:
                self.output_chunks.append(row)
            self.fwd_cache[fwd_chunk_id] = ((row,), [])
            return row
        self.fwd_cache[fwd_chunk_id] = (outputs, [])
        return outputs

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Run the backward, or, without `full_backward`, the half that the stage before waits for."""
        if not self.has_backward:
            return
        self.fwd_cache.pop(bwd_chunk_id)
        came: dict[int, Any] = {}
        if not self.is_last:
            came = dict(zip(self.goes, self._retrieve_recv_grads(bwd_chunk_id), strict=True))
        region = self.cut.stages[self.stage_index]
        tangents = [
            laid(self._tangent(came, region.gives[i]), kind)
            for i, kind in zip(self.program.tangents, self.program.tangent_types, strict=True)
        ]
        saved = [*self.saved.pop(bwd_chunk_id), *tangents]
        mine: dict[int, Any] = {}
        if full_backward:
            results: Sequence[Any] = () if self.program.backward is None else self.program.backward.run(saved)
            mine = {region.reads[i]: g for i, g in zip(self.program.of, results, strict=True)}
            self._accumulate(mine)
        else:
            self.parts = self.parts or self.program.parts()
            parts, count = self.parts, len(self.parts.input_of)
            results = () if parts.input is None else parts.input.run([saved[i] for i in parts.input_reads])
            mine = {region.reads[i]: g for i, g in zip(parts.input_of, results[:count], strict=True)}
            rest = [*(saved[i] for i in parts.weight_reads), *results[count:]]
            self.dw_runner[bwd_chunk_id] = lambda: self._weight(parts, rest)
        self.bwd_cache[bwd_chunk_id] = tuple(self._back(n, came, mine) for n in self.came)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Run the other half."""
        if self.has_backward:
            self.dw_runner.pop(bwd_chunk_id)()

    def _weight(self, parts: Backward, inputs: list[Any]) -> None:
        if parts.weight is not None:
            region = self.cut.stages[self.stage_index]
            results = parts.weight.run(inputs)
            self._accumulate({region.reads[i]: g for i, g in zip(parts.weight_of, results, strict=True)})

    def _back(self, n: int, came: Mapping[int, Any], mine: Mapping[int, Any]) -> torch.Tensor | None:
        if n not in self.cut.gradients:
            return None
        found = [g for g in (came.get(n), mine.get(n)) if g is not None]
        if not found:
            return torch.zeros_like(self._example(n))
        return found[0].contiguous() if len(found) == 1 else found[0] + found[1]

    def _tangent(self, came: Mapping[int, Any], n: int) -> torch.Tensor:
        g = came.get(n)
        return torch.zeros_like(self._example(n)) if g is None else g

    def _accumulate(self, gradients: Mapping[int, Any]) -> None:
        for n, g in gradients.items():
            if n not in self.cut.state:
                continue
            p = self.cut.state[n]
            if p.grad is None:
                p.grad = g.clone(memory_format=torch.contiguous_format)
            else:
                p.grad += g


__all__ = ["stage_loss", "torch_stages"]
