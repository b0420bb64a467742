"""How precise what is kept of finished frames is: keys and values in 8 bits, and sums that autocast does not round."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

SCALE_BYTES = 4  # a float32


def packed_as(dtype: str | None) -> Callable[[Tensor], Tensor]:
    """How a context keeps keys and values [..., D]: as they are, or with `pack`."""
    return pack if dtype == "int8" else lambda x: x


def pack(x: Tensor) -> Tensor:
    """[..., D] to int8 [..., D + 4]: D rounded numbers, and the bytes of their scale.

        scale = max|x| / 127,   q = round(x / scale),   x' = scale q,   |x' - x| <= scale / 2

    One scale for each token and head, symmetric, with zero kept exact. All axes but the last can be indexed, sliced
    and joined as those of x. Where x carries gradient, the result is x' itself, with the gradient of x
    (straight-through), so that training sees the values that sampling sees."""
    scale = x.detach().float().abs().amax(-1, keepdim=True) / 127
    codes = (x.detach().float() / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
    if x.requires_grad:
        return scale * codes + (x - x.detach()).float()
    return torch.cat([codes, scale.contiguous().view(torch.int8)], dim=-1)


def unpack(x: Tensor) -> Tensor:
    """What `pack` kept, float32; anything else as it is."""
    if x.dtype != torch.int8:
        return x
    scale = x[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return scale * x[..., :-SCALE_BYTES]


def uncast(x: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on the device of x, in which training computes what sampling does."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
