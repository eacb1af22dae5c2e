"""Two network namespaces joined by a link whose rate can be set, and ranks that run in them.

Needs root and the tools of iproute2; `Link.available` says whether they work here. Without them ranks run on the loopback
device, whose rate nothing limits: results are right there, times say nothing.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

BURST = "80kb"
"""What an idle link lets through at once: little, so that exchanges go at the rate that is set; but several packets, for
what a late timer of the host leaves unused is lost (with 20 KB the same steps took 620 or 960 ms)."""
PACKET = "16000"
LIMIT = "64mb"


def set_rate(device: str, mbit: float) -> None:
    """Limit what leaves through a device of the own namespace, 0 for no limit."""
    subprocess.run(["tc", "qdisc", "del", "dev", device, "root"], capture_output=True, check=False)
    if mbit:
        rate = [
            "tc",
            "qdisc",
            "add",
            "dev",
            device,
            "root",
            "tbf",
            "rate",
            f"{mbit:.3f}mbit",
            "burst",
            BURST,
            "limit",
            LIMIT,
        ]
        subprocess.run(rate, check=True, capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Link:
    """A pair of namespaces; use it in a `with` block. Rank r lives in namespace r and pinned to core r."""

    def __init__(self) -> None:
        self._names = [f"plait{os.getpid()}{end}" for end in "ab"]
        self.devices = [f"pl{os.getpid() % 100000}{end}" for end in "ab"]
        self.addresses = ["10.77.0.1", "10.77.0.2"]

    @staticmethod
    def available() -> bool:
        """Whether namespaces and limits can be made here."""
        if os.geteuid() or not shutil.which("ip") or not shutil.which("tc"):
            return False
        try:
            with Link():
                return True
        except (OSError, subprocess.CalledProcessError):
            return False

    def __enter__(self) -> Link:
        try:
            for name in self._names:
                _ip("netns", "add", name)
            a, b = self.devices
            _ip("link", "add", a, "netns", self._names[0], "type", "veth", "peer", "name", b, "netns", self._names[1])
            for name, device, address in zip(self._names, self.devices, self.addresses, strict=True):
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "link", "set", device, "gso_max_size", PACKET)
                _ip("-n", name, "link", "set", device, "up")
            probe = ["ip", "netns", "exec", self._names[0], "tc", "qdisc", "add", "dev", a, "root", "tbf", "rate", "1gbit"]
            subprocess.run([*probe, "burst", BURST, "limit", LIMIT], check=True, capture_output=True)
            subprocess.run(["ip", "netns", "exec", self._names[0], "tc", "qdisc", "del", "dev", a, "root"], check=True)
        except (OSError, subprocess.CalledProcessError):
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the namespaces, and the link with them."""
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    def run(self, rank: int, *words: str) -> None:
        """Run a command in the namespace of a rank, such as `tc` or `ip link set` on its device."""
        _ip("netns", "exec", self._names[rank], *words)

    def start(
        self, command: Sequence[str], logs: Path, environment: dict[str, str] | None = None
    ) -> list[subprocess.Popen[str]]:
        """Run a command as both ranks, told by RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and PLAIT_LINK_DEVICE."""
        started: list[subprocess.Popen[str]] = []
        for rank, (name, device) in enumerate(zip(self._names, self.devices, strict=True)):
            own = {"GLOO_SOCKET_IFNAME": device, "PLAIT_LINK_DEVICE": device, "MASTER_ADDR": self.addresses[0]}
            where = ["ip", "netns", "exec", name, "taskset", "-c", str(rank % (os.cpu_count() or 1))]
            started.append(_start([*where, *command], rank, {**own, **(environment or {})}, logs))
        return started


def start_on_loopback(
    command: Sequence[str], logs: Path, environment: dict[str, str] | None = None
) -> list[subprocess.Popen[str]]:
    """Run a command as two ranks that talk over the loopback device."""
    own = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", **(environment or {})}
    return [_start(list(command), rank, own, logs) for rank in range(2)]


def _start(command: list[str], rank: int, environment: dict[str, str], logs: Path) -> subprocess.Popen[str]:
    given = {
        **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": "29517", "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1", **environment,
    }  # fmt: skip
    with (logs / f"rank{rank}.log").open("w") as log:
        return subprocess.Popen(command, env=given, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def finish(ranks: Sequence[subprocess.Popen[str]], timeout: float) -> list[int]:
    """Wait for ranks; their exit codes. What takes longer, and the others once one failed, is killed."""
    end = time.monotonic() + timeout
    while any(p.poll() is None for p in ranks):
        if time.monotonic() > end or any(p.poll() for p in ranks):
            time.sleep(2.0)
            stop(ranks)
            break
        time.sleep(0.1)
    return [p.wait() for p in ranks]


def stop(ranks: Sequence[subprocess.Popen[str]]) -> None:
    """Kill what still runs."""
    for p in ranks:
        if p.poll() is None:
            os.killpg(p.pid, signal.SIGKILL)


def free_port() -> int:
    """A port that nothing listens on just now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def folder() -> Path:
    """A new folder for logs and results."""
    return Path(tempfile.mkdtemp(prefix="plait-overlap-"))
