"""A student with fewer attention heads than its teacher: a narrower network, which begins with the teacher's first
heads and channels."""

from collections.abc import Mapping, Sequence
from math import gcd
from typing import Any, NamedTuple

from torch import Tensor, nn


class Width(NamedTuple):
    """How many channels a token has in the teacher's network, and in the student's."""

    teacher: int
    student: int


def cut(tensor: Tensor, shape: Sequence[int], width: Width) -> Tensor:
    """The part of a tensor of the teacher that a student of this shape begins with.

    Dimensions of the same size are kept. One that is k widths long consists of k groups of channels, as those of
    attention heads, of a modulation or of a feed-forward layer are, and the first channels of each group are kept.
    Where k is a fraction p / q, there are p groups, each of a q-th of the width. Raises ValueError for other
    shapes."""
    if tensor.dim() != len(shape):
        raise ValueError(f"a tensor of shape {list(tensor.shape)} cannot be cut to {list(shape)}")
    for dim, (size, own) in enumerate(zip(tensor.shape, shape, strict=True)):
        if size == own:
            continue
        group = gcd(size, width.teacher)
        kept, rest = divmod(group * width.student, width.teacher)
        if rest or size // group * kept != own:
            raise ValueError(
                f"{size} of {list(tensor.shape)} cannot be cut to {own} where the width is cut from {width.teacher} "
                f"to {width.student}"
            )
        tensor = tensor.unflatten(dim, (-1, group)).narrow(dim + 1, 0, kept).flatten(dim, dim + 1)
    return tensor


def keep_heads(network: Any, settings: Mapping[str, Any], width: Width) -> Any:
    """A network of the same class of diffusers with other settings in its config, whose parameters are cut from those
    of the given one, on the same device. Buffers, such as tables of positions, are those that the class makes for this
    width. Raises ValueError if the two networks do not have the same parameters."""
    from accelerate import init_empty_weights

    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    with init_empty_weights(include_buffers=False):
        narrow = type(network).from_config(config | dict(settings))
    given, own = dict(network.named_parameters()), dict(narrow.named_parameters())
    if differing := sorted(given.keys() ^ own.keys()):
        raise ValueError(f"student_heads: the narrower network differs in {', '.join(differing[:4])}")
    try:
        values = {name: cut(given[name].detach(), p.shape, width).clone() for name, p in own.items()}
    except ValueError as error:
        raise ValueError(f"student_heads: {error}; choose another number of heads") from None
    narrow.load_state_dict(values, strict=False, assign=True)
    dtypes = {name: buffer.dtype for name, buffer in network.named_buffers()}
    for name, buffer in narrow.named_buffers():
        buffer.data = buffer.data.to(dtypes[name])
    narrow.kept_width = width
    return narrow


def kept_width(module: nn.Module) -> Width | None:
    """The width from which the networks in this module were cut, and that to which; None for whole networks."""
    return next((m.kept_width for m in module.modules() if isinstance(vars(m).get("kept_width"), Width)), None)  # type: ignore[return-value]
