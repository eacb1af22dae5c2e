"""What a training step refuses before anything is compiled."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ...errors import ForeignParameters, NothingToTrain, SeveralDevices, WrappedModel


def check_model(model: torch.nn.Module) -> None:
    """Raise WrappedModel for what acts on gradients while autograd runs, NothingToTrain, SeveralDevices."""
    for name, module in model.named_modules():
        wrapper = _wrapper(module)
        at = f" in {name!r}" if name else ""
        if wrapper is not None:
            raise WrappedModel(what=f"a {wrapper} model{at}", way="pass the module that it wraps, and the ranks as `mesh`")
        if module._backward_hooks or module._backward_pre_hooks:
            raise WrappedModel(what=f"backward hooks{at}", way="remove them; gradients are in `p.grad` after the step")
    for name, p in model.named_parameters():
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            way = "remove it; gradients are in `p.grad` after the step"
            raise WrappedModel(what=f"a hook on the gradient of {name!r}", way=way)
    if not any(p.requires_grad for p in model.parameters()):
        raise NothingToTrain(why="no parameter of the model requires gradients")
    check_devices((*model.parameters(), *model.buffers()))


def _wrapper(module: torch.nn.Module) -> str | None:
    """What distributes a module behind autograd's back, None for plain ones."""
    if isinstance(module, torch.nn.parallel.DistributedDataParallel):
        return "DistributedDataParallel"
    if any(c.__name__ in ("FullyShardedDataParallel", "FSDPModule") for c in type(module).__mro__):
        return "FSDP"
    return None


def check_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise ForeignParameters where the optimizer steps over tensors that get no gradients here, WrappedModel where it
    wants to compute the loss itself."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise WrappedModel(what="LBFGS", way="take an optimizer whose step() needs no closure")
    mine = {id(p) for p in model.parameters()}
    for number, group in enumerate(optimizer.param_groups):
        for at, p in enumerate(group["params"]):
            if id(p) not in mine:
                what = f"parameter {at} of the optimizer's group {number}, {list(p.shape)},"
                raise ForeignParameters(what=what, way="make the optimizer over model.parameters() of this very model")


def check_devices(tensors: Iterable[torch.Tensor]) -> None:
    """Raise SeveralDevices; single numbers may lie on the CPU."""
    devices = {str(t.device) for t in tensors if t.dim() or t.device.type != "cpu"}
    if len(devices) > 1:
        raise SeveralDevices(devices=", ".join(sorted(devices)))
