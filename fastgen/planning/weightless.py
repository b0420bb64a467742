"""Tensors without memory, and a count of the bytes that live tensors hold. Both serve to know a run's peak beforehand.

A `Weightless` tensor has the shape, dtype and memory size of a CPU tensor, but no values. Unlike a meta tensor it
reports the CPU as its device, so autocast applies to it. It can also be combined with small real tensors (sample ids,
noise levels, stop indices), whose values may decide the graph.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from fastgen.planning.flops import flops

CPU, META = torch.device("cpu"), torch.device("meta")
SMALL = 4096  # a constant tensor of at most this many elements is made with its values
LARGE = 1 << 26  # bytes from which on a result is weightless although everything that it is made of has values
SIDE = 8192  # of a square mask of LARGE bytes: smaller tensors make nothing large, except where they are repeated
aten = torch.ops.aten
CONSTANTS_LIKE = {aten.full_like.default, aten.zeros_like.default, aten.ones_like.default}
CONSTANTS_NEW = {aten.new_full.default, aten.new_zeros.default, aten.new_ones.default}


class Memory:
    """Stands for a storage; the views of a tensor share it."""

    __slots__ = ("__weakref__", "nbytes")

    def __init__(self, nbytes: int):
        self.nbytes = nbytes


class Layout:
    """Everything about a tensor except its values. Equal layouts are one object (`layout_of`)."""

    def __init__(self, tensor: Tensor):
        self.shape, self.strides, self.offset = tensor.shape, tensor.stride(), tensor.storage_offset()
        self.dtype, self.nbytes = tensor.dtype, tensor.untyped_storage().nbytes()

    def make(self, memory: Memory | None) -> "Weightless":
        result: Weightless = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            Weightless, self.shape, self.strides, self.offset, dtype=self.dtype, device=CPU
        )
        result.memory, result.described = memory or Memory(self.nbytes), self
        return result


_layouts: dict[Any, Layout] = {}


def layout_of(tensor: Tensor) -> Layout:
    return _layouts.setdefault((*described(tensor), tensor.untyped_storage().nbytes()), Layout(tensor))


def described(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


class Operation:
    """What is known of an operation of torch. kind: what it returns, which is its first argument ("in place"), a view
    of it ("view"), a tensor of one value ("like", "new constant") or any other new tensor ("new"). results: what it
    returned, and the floating-point operations that took, by the layouts of its arguments."""

    def __init__(self, func: Any):
        self.func, self.results, self.sizes = func, dict[Any, tuple[Any, int]](), dict[Any, int]()
        self.makes = func is aten.repeat.default or not any("Tensor" in str(a.type) for a in func._schema.arguments)
        self.takes_device = any(argument.name == "device" for argument in func._schema.arguments)
        self.returns = bool(func._schema.returns)
        aliased = any(r.alias_info is not None for r in func._schema.returns)
        self.kind = "in place" if func._schema.name.endswith("_") else "view" if aliased else "new"
        self.kind = "like" if func in CONSTANTS_LIKE else "new constant" if func in CONSTANTS_NEW else self.kind

    def __call__(self, args: Any, kwargs: Any) -> tuple[Any, int]:
        """The result, and its floating-point operations."""
        if self.kind == "in place":
            return args[0] if self.returns else None, 0
        if self.func is aten.index.Tensor:
            args = (args[0], numbered(args[1]))
        if self.kind == "like" and args[0].numel() <= SMALL:
            return self.func(torch.empty(args[0].shape, dtype=args[0].dtype), *args[1:], **kwargs), 0
        if self.kind == "new constant" and torch.Size(args[1]).numel() <= SMALL:
            return self.func(torch.empty(0, dtype=args[0].dtype), *args[1:], **kwargs), 0
        key = (signature(args), signature(tuple(kwargs.items()))) if kwargs else signature(args)
        if key not in self.results:
            result = self.func(*tree_map(bare, args), **self.placed(tree_map(bare, kwargs)))
            count = flops(self.func, args, kwargs, result)
            self.results[key] = tree_map(lambda v: layout_of(v) if isinstance(v, Tensor) else v, result), count
        memory = args[0].memory if self.kind == "view" else None
        found, count = self.results[key]
        if isinstance(found, Layout):
            return found.make(memory), count
        return tree_map(lambda value: value.make(memory) if isinstance(value, Layout) else value, found), count

    def is_large(self, args: Any, kwargs: Any) -> bool:
        """Whether it makes a large tensor, of arguments that have values: the attention mask of a long video takes
        gigabytes. False where the size is not known before the values are."""
        if self.kind != "new" or not (self.makes or any(isinstance(a, Tensor) and a.numel() > SIDE for a in args)):
            return False
        key = signature(args), signature(tuple(kwargs.items()))
        if key not in self.sizes:
            try:
                made = self.func(*tree_map(bare, args), **self.placed(tree_map(bare, kwargs)))
                self.sizes[key] = size([v for v in tree_flatten(made)[0] if isinstance(v, Tensor)])
            except (RuntimeError, NotImplementedError):
                self.sizes[key] = 0
        return self.sizes[key] > LARGE

    def placed(self, kwargs: Any) -> Any:
        """The arguments of a call that makes its result on the meta device."""
        return {**kwargs, "device": META} if self.takes_device else kwargs


def numbered(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices in which each mask [N, ...] with values is the numbers of the places that it selects, so that the layout
    of the result is known."""
    found: list[Tensor | None] = []
    for index in indices:
        if type(index) is Tensor and index.dtype == torch.bool:
            found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found


_operations: dict[Any, Operation] = {}


def operation(func: Any) -> Operation:
    found = _operations.get(func)
    if found is None:
        found = _operations[func] = Operation(func)
    return found


class Weightless(Tensor):
    """A tensor of known size without values. What an operation returns is found by running it on meta tensors. That is
    remembered by the layouts of its arguments, because networks repeat their blocks. `Layout.make` makes one."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    memory: Memory
    described: Layout

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return operation(func)(args, kwargs or {})[0]


def signature(value: Any) -> Any:
    """A hashable key of everything in an argument that the layouts of an operation's results depend on."""
    kind = type(value)  # is compared first, because isinstance takes longer, and a plan asks half a million times
    if kind is Weightless:
        return value.described
    if kind is tuple or kind is list:
        return tuple([signature(v) for v in value])
    if isinstance(value, Tensor):
        return described(value)
    return tuple([signature(v) for v in value]) if isinstance(value, tuple) else (kind, value)


def bare(value: Any) -> Any:
    """A tensor as a meta tensor of the same layout, and a device as the meta device; other values as they are."""
    if isinstance(value, Weightless):
        memory = torch.empty(value.memory.nbytes // value.element_size(), dtype=value.dtype, device=META)
        return memory.as_strided(value.shape, value.stride(), value.storage_offset())
    if isinstance(value, Tensor):
        return value.to(META) if value.dim() else value  # a scalar has type promotion rules of its own
    return META if isinstance(value, torch.device) else value


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Weightless:
    return layout_of(torch.empty(shape, dtype=dtype, device=META)).make(None)


def weightless(module: nn.Module) -> nn.Module:
    """Replaces a module's parameters and buffers in place by weightless ones. Shared tensors stay shared."""
    seen: dict[Tensor, Tensor] = {}
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is None or isinstance(tensor, Weightless):
                    continue
                if tensor not in seen:
                    new = empty(*tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    seen[tensor] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
                held[name] = seen[tensor]  # type: ignore[assignment]
    return module


def tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def size(held: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in held)


def memory_of(tensor: Tensor) -> Any:
    return tensor.memory if isinstance(tensor, Weightless) else tensor.untyped_storage()


def identity(memory: Any) -> int:
    return id(memory) if isinstance(memory, Memory) else memory._cdata


def nbytes(memory: Any) -> int:
    return memory.nbytes if isinstance(memory, Memory) else memory.nbytes()


class Watching:
    """Sees every operation. It is a class of its own because torch wraps a mode's own __torch_dispatch__, on behalf of
    torch.compile, in two more calls for every operation."""

    flops: int
    note: Callable[[Any], None]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, known = kwargs or {}, operation(func)
        if Weightless in types or known.is_large(args, kwargs):
            out, count = known(args, kwargs)  # at once, instead of through another dispatch
        else:
            out = func(*args, **kwargs)
            count = flops(func, args, kwargs, out)
        self.flops += count
        if known.kind in ("in place", "view"):
            return out
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.note(memory_of(value))
        return out


class LiveBytes(Watching, TorchDispatchMode):
    """Counts the bytes of storages that operations have made since it was entered and that are still alive, for real
    and for weightless tensors. Memory that kernels use internally and release is not seen.

    gradients: bytes of the gradients declared by `own_gradients`. live: all other bytes. flops: floating-point
    operations so far. history: the moments (live, gradients) that `mark` keeps; the largest sum of the two is the
    peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.gradients, self.flops = 0, 0, 0
        self.history: list[tuple[int, int]] = [(0, 0)]
        self._known: dict[int, weakref.ref] = {}
        self._owned: set[int] = set()

    def note(self, memory: Any) -> None:
        key = identity(memory)
        if key in self._known:
            return
        size = nbytes(memory)
        self._known[key] = weakref.ref(memory, lambda _: self.release(key, size))
        self.live += size
        self.mark()

    def release(self, key: int, size: int) -> None:
        del self._known[key]
        if key in self._owned:
            self._owned.remove(key)
            self.gradients -= size
        else:
            self.live -= size

    def mark(self) -> None:
        """Keeps this moment unless the last kept one is at least as large in both numbers. First drops the last kept
        ones that this moment equals or exceeds in both."""
        while self.history and self.history[-1][0] <= self.live and self.history[-1][1] <= self.gradients:
            self.history.pop()
        if not self.history or self.live > self.history[-1][0] or self.gradients > self.history[-1][1]:
            self.history.append((self.live, self.gradients))

    def own_gradient(self, parameter: Tensor) -> None:
        """Counts a parameter's gradient under `gradients` instead of `live`."""
        assert parameter.grad is not None
        memory = memory_of(parameter.grad)
        key = identity(memory)
        if key in self._known and key not in self._owned:
            self._owned.add(key)
            self.live -= nbytes(memory)
            self.gradients += nbytes(memory)

    def own_gradients(self, parameters: Iterable[Tensor]) -> list[Callable[[], None]]:
        """Does so for each parameter when its gradient is accumulated. Returns functions that remove the hooks."""
        return [
            p.register_post_accumulate_grad_hook(self.own_gradient).remove  # type: ignore[attr-defined]
            for p in parameters
            if p.requires_grad
        ]

    def peak(self, divided_by: int = 1) -> int:
        """The most bytes alive at once, with gradients sharded over this many processes."""
        return max(live + -(-gradients // divided_by) for live, gradients in self.history)
