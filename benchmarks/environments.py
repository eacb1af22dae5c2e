"""Packages that only a peer needs, in folders of their own under build/, so that the environment stays as it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .machine import ROOT

PROGRAMS = Path(__file__).with_name("peers")


class NoPeer(Exception):
    """Why a peer is not to be had here."""


def folder(name: str) -> Path:
    """Where the packages of a peer lie, installed or not."""
    return ROOT / "build" / "peers" / name


def is_installed(name: str, packages: tuple[str, ...]) -> bool:
    """Whether `installed` would find its work done."""
    done = folder(name) / "done"
    return done.exists() and done.read_text().split() == list(packages)


def installed(
    name: str, packages: tuple[str, ...], settings: Mapping[str, str] | None = None, timeout_s: float = 1800
) -> Path:
    """A folder for PYTHONPATH with these packages, without what they depend on, installed if it is not there.

    What they depend on is taken from the environment that this runs in (torch above all). `settings`: environment
    variables for building them. Raises NoPeer.
    """
    if is_installed(name, packages):
        return folder(name)
    shutil.rmtree(folder(name), ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder(name)), *packages]
    environment = {**os.environ, **(settings or {})}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise NoPeer(f"{name} was not installed within {timeout_s:.0f} s") from None
    if done.returncode:
        raise NoPeer(f"pip cannot install {name}: {done.stderr.strip().splitlines()[-1:]}")
    (folder(name) / "done").write_text("\n".join(packages))
    return folder(name)


def run(
    name: str, packages: tuple[str, ...], program: str, given: Mapping[str, Tensor], settings: Any, timeout_s: float = 600
) -> tuple[dict[str, Tensor], Any]:
    """Run a program of the folder `peers` with a peer's packages; (tensors, whatever else) that it gives back.

    The program finds tensors in a safetensors file and settings as JSON, named by its first two arguments, and writes the
    same to its third and fourth. Raises NoPeer.
    """
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "PYTHONPATH": str(installed(name, packages)), "OMP_NUM_THREADS": threads}
    with tempfile.TemporaryDirectory(prefix="plait-peer-") as place:
        files = [Path(place, f) for f in ("in.safetensors", "in.json", "out.safetensors", "out.json")]
        save_file({k: t.detach().contiguous() for k, t in given.items()}, files[0])
        files[1].write_text(json.dumps(settings))
        command = [sys.executable, str(PROGRAMS / program), *map(str, files)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise NoPeer(f"{name} did not end within {timeout_s:.0f} s") from None
        if done.returncode:
            raise NoPeer(f"{name} failed: {done.stderr.strip().splitlines()[-1:]}")
        tensors = load_file(files[2]) if files[2].exists() else {}
        return tensors, json.loads(files[3].read_text()) if files[3].exists() else None
