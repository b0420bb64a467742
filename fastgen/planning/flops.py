"""The floating-point operations of one tensor operation, by the formulas of torch.utils.flop_counter."""

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """That of scaled_dot_product_attention as a CPU runs it, which the registry lacks."""
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def cpu_attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


FORMULAS: dict[Any, Any] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: cpu_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: cpu_attention_backward,
}


def flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Multiplications and additions of matrix products, convolutions and attention; 0 for any other operation."""
    formula = FORMULAS.get(func._overloadpacket)
    return 0 if formula is None else formula(*args, **kwargs, out_val=out)
