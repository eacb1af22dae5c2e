"""A model in source form, for tests of the command line, which imports models by name."""

MLP = """
import torch

class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(8, 32), torch.nn.Linear(32, 8)

    def forward(self, x):
        return self.down(torch.nn.functional.gelu(self.up(x))) + x

def mlp(): return Mlp(), (torch.ones(4, 8),)
"""
