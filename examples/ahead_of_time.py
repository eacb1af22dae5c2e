"""Compile a model once, ship one file, run it where neither the model's code nor plait's compiler is.

    python examples/ahead_of_time.py

The same from the shell:

    plait compile ahead_of_time:make -o denoiser.plait     # in the folder of this file
    plait run denoiser.plait --random --compare graph
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import plait
import torch
from torch import nn


class Denoiser(nn.Module):
    """Two convolutions over a signal, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv1d(1, 16, 5, padding=2)
        self.outer = nn.Conv1d(16, 1, 5, padding=2)

    def forward(self, signal: torch.Tensor) -> torch.Tensor:
        """A signal [batch, 1, length] of the same shape."""
        return signal - self.outer(torch.tanh(self.inner(signal)))


def make() -> tuple[nn.Module, tuple[torch.Tensor], dict[str, object]]:
    """The model, example inputs, and which of their sizes may vary: what `plait compile` calls a SRC."""
    torch.manual_seed(0)
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 2: torch.export.Dim("length", min=8, max=4096)}
    return Denoiser().eval(), (torch.randn(2, 1, 128),), {"signal": sizes}


ELSEWHERE = """
import sys, torch, plait
model = plait.load(sys.argv[1])
out = model(torch.ones(3, 1, 50))
parts = sorted({m.split(".")[1] for m in sys.modules if m.startswith("plait.")})
print(f"in another process: output {tuple(out.shape)}, imported of plait: {', '.join(parts)}")
"""


def main() -> None:
    """Compile, save, load in this process and in another one."""
    model, inputs, sizes = make()
    compiled = plait.compile(model, inputs, dynamic_shapes=sizes)
    print(compiled)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "denoiser.plait")
        compiled.save(path)
        loaded = plait.load(path)
        signal = torch.randn(5, 1, 333)
        with torch.no_grad():
            torch.testing.assert_close(loaded(signal), model(signal))
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB, same answer as eager")
        subprocess.run([sys.executable, "-c", ELSEWHERE, str(path)], check=True)


if __name__ == "__main__":
    main()
