"""Which of an artifact's plans runs where: a plan for each target it was compiled for, placed on one device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from ..errors import DeviceNotAvailable
from .cuda import fits
from .plan import Call, Launch, Plan


def choose(targets: Iterable[str], device: str | torch.device | None = None) -> tuple[str, torch.device]:
    """(target, device) that an artifact with plans for `targets` ("cpu", "cuda:90") runs on.

    Without `device`, the current CUDA device where this process has one that a target fits, else the CPU. Raises
    DeviceNotAvailable for a device that this process cannot use or that no target fits.
    """
    known = list(targets)
    if device is None:
        current = torch.device("cuda", torch.cuda.current_device()) if _why_no_cuda() is None else None
        if current is not None and (target := _fitting(known, current)) is not None:
            return target, current
        device = "cpu" if "cpu" in known else "cuda"
    wanted = torch.device(device)
    if wanted.type == "cuda":
        why = _why_no_cuda()
        if why is not None:
            raise DeviceNotAvailable(device=wanted, why=why)
        wanted = torch.device("cuda", torch.cuda.current_device() if wanted.index is None else wanted.index)
        if wanted.index >= torch.cuda.device_count():
            raise DeviceNotAvailable(device=wanted, why=f"this machine has {torch.cuda.device_count()} CUDA devices")
    target = _fitting(known, wanted)
    if target is None:
        what = f" (compute capability {_capability(wanted) / 10:.1f})" if wanted.type == "cuda" else ""
        raise DeviceNotAvailable(device=f"{wanted}{what}", why=f"it was compiled for {', '.join(known)}")
    return target, wanted


def _why_no_cuda() -> str | None:
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return "this build of torch has no CUDA support"
    return "torch finds no CUDA device and driver"


def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def _fitting(targets: list[str], device: torch.device) -> str | None:
    """The target of a device: the newest whose binaries run there; None where there is none."""
    if device.type != "cuda":
        return device.type if device.type in targets else None
    capability = _capability(device)
    good = [t for t in targets if fits(t, capability)]
    return max(good, key=lambda t: int(t.partition(":")[2]), default=None)


def place(plan: Plan, device: torch.device) -> Plan:
    """A plan of one device with all that lies on devices of its kind moved to `device`; a CPU's plan as it is."""
    if device.type == "cpu":
        return plan
    name = str(device)

    def moved(old: str) -> str:
        return name if torch.device(old).type == device.type else old

    def argument(template: Any) -> Any:
        ((kind, x),) = template.items()
        if kind == "l":
            return {"l": [argument(part) for part in x]}
        return {"dev": moved(x)} if kind == "dev" else template

    def step(s: Launch | Call) -> Launch | Call:
        if isinstance(s, Launch):
            return s
        return replace(s, args=tuple(map(argument, s.args)), kwargs=tuple((n, argument(a)) for n, a in s.kwargs))

    return replace(
        plan,
        inputs=tuple(replace(i, device=moved(i.device)) for i in plan.inputs),
        values=tuple(replace(v, device=moved(v.device)) for v in plan.values),
        steps=tuple(map(step, plan.steps)),
        regions=tuple((n, place(region, device)) for n, region in plan.regions),
    )
