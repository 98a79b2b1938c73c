"""What launches share: numbers of programs, sizes, descriptors, memory for gradients."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import Config
from .layers import Layers, Side


@cache
def processors(device: torch.device) -> int:
    """How many programs run at once; three on a CPU, so that even small tests share work."""
    if device.type == "cpu":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def round_up(n: int, step: int) -> int:
    """The next multiple of ``step``."""
    return -(-n // step) * step


def padded_width(layers: Layers, config: Config) -> int:
    """Columns of the widest layer, in whole blocks."""
    return round_up(max(*layers.x.widths, *layers.y.widths), config.block)


def gradients(side: Side, layers: Layers, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], int]:
    """Empty gradients of a side, and the stride of their batch."""
    features = side.tensors[: layers.layer_count]
    grads = tuple([torch.empty(t.shape, dtype=dtype, device=layers.device) for t in features])
    return grads, grads[0].shape[-2] * grads[0].shape[-1] if grads[0].dim() == 3 else 0


def descriptors_of(
    layers: Layers, sides: tuple[Side, ...], block: tuple[int, int]
) -> list[TensorDescriptor] | None:
    """The sides' features for the copy engine of sm_90 and later, or None if it cannot load them.

    It loads a single bfloat16 matrix without a mask, whose rows are aligned to 16 bytes and do not
    overlap. Small matrices are not worth the microseconds that a descriptor costs.
    """
    fits = layers.entries == len(layers.rows) == 1 and not layers.is_split and not layers.masks
    if not fits or layers.max_rows < _descriptor_rows(layers.device):
        return None
    tensors = [side.tensors[0].squeeze(0) for side in sides]
    for tensor in tensors:
        stride_n, stride_d = tensor.stride()
        is_separate = stride_n >= tensor.shape[1]
        is_aligned = stride_n % 8 == 0 and tensor.data_ptr() % 16 == 0
        if not is_separate or not is_aligned or stride_d != 1:
            return None
    return [TensorDescriptor.from_tensor(tensor, list(block)) for tensor in tensors]


@cache
def _descriptor_rows(device: torch.device) -> float:
    """The fewest rows for which the copy engine is used."""
    if device.type == "cpu":
        return 256
    has_engine = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    return 1024 if has_engine else float("inf")
