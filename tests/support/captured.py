"""A small model of blocks whose features are captured, and a layer with a fixed output."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rift_kernels as rk


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.attn = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def forward(self, x):
        return x + self.mlp(self.attn(x))


class Net(nn.Module):
    """Tokens (batch, tokens, 4) through blocks, optionally with activation checkpointing."""

    def __init__(self, blocks: int = 3, use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.embed = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.unused = nn.Identity()

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            if self.use_reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x


class Output(nn.Module):
    """Returns a fixed output."""

    def __init__(self, output) -> None:
        super().__init__()
        self.output = output

    def forward(self, _=None):
        return self.output


def net(**settings) -> Net:
    torch.manual_seed(0)
    return Net(**settings)


def tokens(batch: int = 2, count: int = 5, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, 4, generator=generator)


def captured(output, pooling="cls", mask=None):
    model = Output(output)
    with rk.FeatureCapture(model, "", pooling) as capture:
        model()
    return capture.features(mask)[""]
