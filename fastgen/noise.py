"""Random numbers that depend only on (key, sample id, element), never on batch size, rank or device.

This is a counter-based generator: every draw is a hash of its coordinates. Nothing has to be stored to resume a run,
and a sample gets the same noise whether it is computed alone, in a batch of 64, or on another machine.
The mixing function is the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), applied twice.
"""

import hashlib
import math

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def make_key(*parts: int | str) -> int:
    """A signed 64-bit key from integers and names; the same parts give the same key in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _shift_right(z: Tensor, n: int) -> Tensor:
    """Logical right shift of signed integers (torch's is arithmetic)."""
    return (z >> n).bitwise_and_((1 << (64 - n)) - 1)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser. In place, because allocating new memory would take most of the time of a draw."""
    z.bitwise_xor_(_shift_right(z, 30)).mul_(_MIX1)
    z.bitwise_xor_(_shift_right(z, 27)).mul_(_MIX2)
    return z.bitwise_xor_(_shift_right(z, 31))


def _uniform(ids: Tensor, count: int, key: int) -> Tensor:
    """[B, count] float64 in (0, 1), with 53 random bits each."""
    element = torch.arange(1, count + 1, device=ids.device, dtype=torch.int64)
    row = _mix(ids.to(torch.int64) * _GOLDEN + key)
    bits = _mix(_mix(row[:, None] + element * _GOLDEN))
    return _shift_right(bits, 11).double().add_(0.5).mul_(2.0**-53)


def uniform(ids: Tensor, shape: tuple[int, ...], key: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform draws in (0, 1). ids: [B] int64 sample ids. Returns [B, *shape]."""
    u = _uniform(ids, math.prod(shape), key).to(dtype)
    u = u.clamp(max=1 - torch.finfo(dtype).eps / 2)  # in float32, 1 - 1e-9 rounds to 1
    return u.reshape(len(ids), *shape)


def normal(ids: Tensor, shape: tuple[int, ...], key: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal draws by Box-Muller in float64. ids: [B] int64 sample ids. Returns [B, *shape]."""
    count = math.prod(shape)
    pairs = (count + 1) // 2
    u = _uniform(ids, 2 * pairs, key)
    radius, angle = u[:, :pairs].log().mul_(-2).sqrt_(), u[:, pairs:] * (2 * math.pi)
    z = torch.cat([angle.cos().mul_(radius), angle.sin().mul_(radius)], dim=1)[:, :count]
    return z.to(dtype).reshape(len(ids), *shape)


def integer(high: int, key: int) -> int:
    """One integer in [0, high), the same on every rank. For choices that change the graph (stop index, phase)."""
    return int(make_key("integer", key) % high)
