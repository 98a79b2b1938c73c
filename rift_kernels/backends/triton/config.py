from __future__ import annotations
from typing import NamedTuple
import torch
from .layers import Layers

class Config(NamedTuple):
    block: int = 32
    block_k: int = 32
    warps: int = 4
    stages: int = 2
    block_r: int = 16
    sub: int = 16
    head_warps: int = 4
    backward: tuple[int,int,int] = (32, 32, 32)
    backward_warps: int = 4
    backward_stages: int = 2
    gram_backward: tuple[int,int,int] = (32, 32, 32)
    gram_backward_warps: int = 4
    gram_backward_stages: int = 2
    small_share: int = 32
    small_k: int = 32

def configuration(layers: Layers, form: str) -> Config:
    return Config()
