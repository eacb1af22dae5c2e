"""Small models that are trained in stages: a frozen encoder, trained blocks with a skip over all of them."""

import torch
from torch import nn
from torch.nn import functional as F


class Encoder(nn.Module):
    def __init__(self, width, layers=2):
        super().__init__()
        self.words = nn.Embedding(50, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(layers)
        )

    def forward(self, tokens):
        h = self.words(tokens)
        for layer in self.layers:
            h = h + layer(h)
        return h.mean(1, keepdim=True)


class Denoiser(nn.Module):
    """Blocks behind a frozen encoder; with `noise` it draws some, with `dropout` it drops."""

    def __init__(self, width=16, dropout=0.0, noise=False, blocks=3):
        super().__init__()
        self.noise = noise
        self.encoder = Encoder(width).requires_grad_(False)
        self.enter = nn.Linear(8, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout),
                          nn.Linear(4 * width, width))
            for _ in range(blocks)
        )  # fmt: skip
        self.leave = nn.Linear(width, 8)

    def forward(self, x, tokens):
        about = self.encoder(tokens)
        noise = torch.randn_like(x) if self.noise else torch.zeros_like(x)
        first = h = self.enter(x + noise) + about
        for block in self.blocks:
            h = h + block(h)
        return self.leave(h + first) - noise


def loss(model, x, tokens, y):
    return F.mse_loss(model(x, tokens), y)


def model(**options):
    torch.manual_seed(0)
    return Denoiser(**options)


def sgd(m):
    return torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)


def batches(count, rows=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rows, 5, 8, generator=g), torch.randint(0, 50, (rows, 7), generator=g),
         torch.randn(rows, 5, 8, generator=g))
        for _ in range(count)
    ]  # fmt: skip
