"""Train and run a model through torch.compile with plait as its backend.

    python examples/torch_compile.py

The backend is found by its name; nothing has to be imported from plait.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Classifier(nn.Module):
    """A small network for points in the plane: is a point inside the ring?"""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(2, width), nn.LayerNorm(width), nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [n] of points [n, 2]."""
        return self.down(self.norm(F.gelu(self.up(x)))).squeeze(-1)


def points(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random points and whether their distance from the origin is between 0.5 and 1."""
    x = torch.rand(count, 2) * 2.4 - 1.2
    radius = x.norm(dim=1)
    return x, ((radius > 0.5) & (radius < 1)).float()


def main() -> None:
    """Train for 300 steps, then classify new points."""
    torch.manual_seed(0)
    model = Classifier()
    compiled = torch.compile(model, backend="plait")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(300):
        x, inside = points(256)
        loss = F.binary_cross_entropy_with_logits(compiled(x), inside)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step:3}: loss {loss.item():.3f}")
    with torch.no_grad():
        for count in (1000, 7):  # the second size compiles once more, with a dynamic size that fits all later ones
            x, inside = points(count)
            right = ((compiled(x) > 0) == inside.bool()).float().mean()
            print(f"{count} new points: {right:.0%} right")


if __name__ == "__main__":
    main()
