"""Models for tests and benchmarks: random weights, any scale, inputs to match.

`build(name, scale)` gives a module in eval mode and `example(name, scale, batch, length)` its keyword arguments. The
transformers and the ConvNeXt come from the `transformers` package, the U-Net from `diffusers` (both imported on use); the
residual network and the small modules are plain torch. Dropout is off everywhere, so that training steps can be compared
with eager's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Scale:
    """How large a model is: `width` is the hidden size, `image` the side of a picture in pixels (a multiple of 16)."""

    layers: int = 2
    width: int = 64
    heads: int = 4
    vocab: int = 500
    image: int = 32


SMALL = Scale()


class Residual(nn.Module):
    """Two 3×3 convolutions with batch normalisation, and a shortcut that is projected where the shape changes."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network: a stem, `layers` stages of two blocks that double the channels, pooling, ten classes."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        channels = [width * 2**i for i in range(layers)]
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        stages = []
        for i, c in enumerate(channels):
            stages += [Residual(channels[max(i - 1, 0)], c, 2 if i else 1), Residual(c, c, 1)]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels[-1], 10)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(self.stem(pixel_values)).mean((2, 3)))


def _bert(s: Scale) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=s.vocab,
        hidden_size=s.width,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        intermediate_size=4 * s.width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config)


def _gpt2(s: Scale) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=s.vocab,
        n_embd=s.width,
        n_layer=s.layers,
        n_head=s.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def _llama(s: Scale) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=s.vocab,
        hidden_size=s.width,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=max(s.heads // 2, 1),
        intermediate_size=s.width * 8 // 3,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def _vit(s: Scale) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=s.width,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        intermediate_size=4 * s.width,
        image_size=s.image,
        patch_size=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def _t5(s: Scale) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=s.vocab,
        d_model=s.width,
        d_kv=s.width // s.heads,
        num_layers=s.layers,
        num_heads=s.heads,
        d_ff=4 * s.width,
        dropout_rate=0.0,
        use_cache=False,
    )
    return T5ForConditionalGeneration(config)


def _resnet(s: Scale) -> nn.Module:
    return ResNet(s.layers, s.width)


def _convnext(s: Scale) -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    sizes = [s.width * 2**i for i in range(s.layers)]
    config = ConvNextConfig(
        num_stages=s.layers, hidden_sizes=sizes, depths=[2] * s.layers, image_size=s.image, drop_path_rate=0.0, num_labels=10
    )
    return ConvNextForImageClassification(config)


def _unet(s: Scale) -> nn.Module:
    from diffusers import UNet2DModel

    plain, attentive = ("DownBlock2D", "UpBlock2D"), ("AttnDownBlock2D", "AttnUpBlock2D")
    return UNet2DModel(
        sample_size=s.image,
        layers_per_block=1,
        block_out_channels=tuple(s.width * 2**i for i in range(s.layers)),
        down_block_types=(plain[0],) * (s.layers - 1) + (attentive[0],),
        up_block_types=(attentive[1],) + (plain[1],) * (s.layers - 1),
        attention_head_dim=8,
        norm_num_groups=min(s.width, 8),
    )


MODELS: dict[str, Callable[[Scale], nn.Module]] = {
    "bert": _bert,
    "gpt2": _gpt2,
    "llama": _llama,
    "vit": _vit,
    "t5": _t5,
    "resnet": _resnet,
    "convnext": _convnext,
    "unet": _unet,
}
PICTURES = ("vit", "resnet", "convnext")
"""Models that classify pictures."""


def build(name: str, scale: Scale = SMALL, *, seed: int = 0) -> nn.Module:
    """The model `name` of MODELS in eval mode, with random weights that depend on the seed only."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MODELS[name](scale).eval()


def example(
    name: str, scale: Scale = SMALL, batch: int = 2, length: int = 16, *, labels: bool = False, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Keyword arguments for one call: token ids and a mask with padding, pictures, or a noisy picture and its time step.
    `labels` adds training targets."""
    g = torch.Generator().manual_seed(seed)
    if name == "unet":
        made = {"sample": torch.randn(batch, 3, scale.image, scale.image, generator=g), "timestep": torch.tensor(7)}
        return made | ({"labels": torch.randn(batch, 3, scale.image, scale.image, generator=g)} if labels else {})
    if name in PICTURES:
        made = {"pixel_values": torch.randn(batch, 3, scale.image, scale.image, generator=g)}
        return made | ({"labels": torch.randint(0, 10, (batch,), generator=g)} if labels else {})
    ids = torch.randint(1, scale.vocab, (batch, length), generator=g)
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, length - length // 4 :] = 0
    made = {"input_ids": ids, "attention_mask": mask}
    if name == "t5":
        made["decoder_input_ids"] = torch.randint(1, scale.vocab, (batch, max(length // 2, 1)), generator=g)
    target = made.get("decoder_input_ids", ids)
    return made | ({"labels": target.clone()} if labels else {})


def loss(name: str, model: Callable[..., Any], given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The training loss of one batch from `example(..., labels=True)`; `model` may be compiled."""
    if name == "resnet":
        return F.cross_entropy(model(given["pixel_values"]), given["labels"])
    if name == "unet":
        return F.mse_loss(model(given["sample"], given["timestep"]).sample, given["labels"])
    return model(**given).loss


def mlp(width: int = 32, *, activation: type[nn.Module] = nn.GELU) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Linear, activation, layer norm, linear; with a batch of four."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(width, 2 * width), activation(), nn.LayerNorm(2 * width), nn.Linear(2 * width, width)
        )
        return model.eval(), (torch.randn(4, width),)


class Block(nn.Module):
    """A pre-norm transformer block in plain torch, causal."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def block(width: int = 32) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """One `Block` and a batch of two sequences of length ten."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Block(width).eval(), (torch.randn(2, 10, width),)


def convolutional() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The smallest residual network, and two pictures."""
    return build("resnet", Scale(layers=2, width=8)), (example("resnet")["pixel_values"],)
