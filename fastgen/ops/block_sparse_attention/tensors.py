"""What every launcher needs from a tensor: its strides and its device."""

import torch
from torch import Tensor


def row_strides(tensor: Tensor) -> tuple[int, int, int]:
    """Strides of batch, token and head of [B, L, H, D]. Raises ValueError if the head dimension is not contiguous."""
    if tensor.stride(-1) != 1:
        raise ValueError(f"the last dimension must be contiguous, got strides {tensor.stride()}; call .contiguous()")
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)


def on_device(tensor: Tensor) -> torch.cuda.device:
    """A context that makes the tensor's device the current one, on which kernels start. Does nothing on a CPU."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
