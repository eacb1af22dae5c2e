"""Models in source form, for tests of the command line, which imports models by name."""

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

WORDS = """
import torch

class Words(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.last = torch.nn.Embedding(40, 64), torch.nn.LayerNorm(64), torch.nn.LayerNorm(64)
        self.up, self.down = torch.nn.Linear(64, 128), torch.nn.Linear(128, 64)
        self.head = torch.nn.Linear(64, 40, bias=False)
        with torch.no_grad():
            self.norm.weight[:3] = 20.0  # channels that matter more than others

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(self.last(x + self.down(torch.relu(self.up(self.norm(x))))))

def words(): return Words(), (torch.zeros(2, 8, dtype=torch.int64),)
"""
