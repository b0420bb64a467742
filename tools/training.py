"""What the trainings of the teachers in assets share: Muon, a running average, a loop that continues."""

import copy
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SAVE_SECONDS = 60
WARMUP = 50
COOLDOWN = 0.3  # share of the steps over which the rate falls to zero


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each matrix is made orthogonal (Jordan et al., Muon, 2024; five Newton-Schulz steps).

    torch.optim.Muon takes matrices only; this one also takes convolutions, as matrices [out, in * taps]."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):  # single pictures miss the time convolutions
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                update = orthogonal(p.grad.lerp(momentum, 0.95).flatten(1))
                rate = group["lr"] * max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                p.add_(update.view_as(p), alpha=-rate)


def orthogonal(matrix: Tensor) -> Tensor:
    """A matrix with the singular vectors of `matrix` and singular values near 1."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix) / (matrix.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return x.T if tall else x


def optimizers(matrices: list[nn.Parameter], others: list[nn.Parameter], muon: float, adam: float) -> list:
    """Muon for the matrices and convolutions, AdamW for everything else."""
    return [
        Muon(matrices, muon),
        torch.optim.AdamW(others, lr=adam, betas=(0.9, 0.99), weight_decay=0.0),
    ]


def rate_at(step: int, steps: int) -> float:
    """The learning rate's factor: a short warm-up, then constant, then down to zero in a straight line."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / (COOLDOWN * steps))


def train(
    network: nn.Module,
    losses: Callable[[int, int], dict[str, Tensor]],
    optimizers: list[torch.optim.Optimizer],
    steps: int,
    seed: int,
    folder: Path,
    average_decay: float,
) -> nn.Module:
    """Train until `steps` and return the running average of the weights.

    losses(step, steps) returns named numbers; "loss" is minimised. Every step draws from its own seed. A checkpoint in
    `folder`, written each minute, is continued, and the result is the same as without the interruption."""
    averaged = copy.deepcopy(network).requires_grad_(False)
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    start, seconds = read(folder, network, averaged, optimizers)
    shown: dict[str, float] = {}
    saved, clock = time.monotonic(), time.process_time()
    for step in range(start, steps):
        torch.manual_seed(seed * 1_000_003 + step)
        for group, rate in zip([g for o in optimizers for g in o.param_groups], rates, strict=True):
            group["lr"] = rate * rate_at(step, steps)
        numbers = losses(step, steps)
        network.zero_grad(set_to_none=True)
        numbers["loss"].backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        decay = min(average_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(averaged.parameters()), list(network.parameters()), 1 - decay)
        values = {name: float(value.detach()) for name, value in numbers.items()}
        shown = {name: 0.98 * shown.get(name, value) + 0.02 * value for name, value in values.items()}
        now = time.monotonic()
        if now - saved > SAVE_SECONDS or step == steps - 1:
            seconds, clock, saved = seconds + time.process_time() - clock, time.process_time(), now
            write(folder, network, averaged, optimizers, step + 1, seconds)
            smooth = ", ".join(f"{name} {value:.5f}" for name, value in shown.items())
            print(f"step {step + 1} of {steps}, {seconds / 60:.1f} CPU minutes: {smooth}", flush=True)
    return averaged


def own(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of a network's state dict; one that has two names is there once."""
    named = network.state_dict(keep_vars=True)
    first = {id(value): name for name, value in reversed(named.items())}
    return {name: value.detach() for name, value in named.items() if first[id(value)] == name}


def tensors_of(network: nn.Module, averaged: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    found = {f"network.{name}": value for name, value in own(network).items()}
    found |= {f"average.{name}": value for name, value in own(averaged).items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{number}.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    return found


def write(
    folder: Path,
    network: nn.Module,
    averaged: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    step: int,
    seconds: float,
) -> None:
    """The checkpoint of the first `step` steps."""
    tensors = {name: value.contiguous() for name, value in tensors_of(network, averaged, optimizers).items()}
    save_whole(tensors, folder / "checkpoint.safetensors", {"step": str(step), "seconds": str(seconds)})


def save_whole(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write the file under another name first, so that it is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path.with_suffix(".new"), metadata)
    os.replace(path.with_suffix(".new"), path)


def read(folder: Path, network: nn.Module, averaged: nn.Module, optimizers: list) -> tuple[int, float]:
    """Load the checkpoint, if there is one; return its step and the CPU seconds trained so far."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0, 0.0
    found = load_file(path)
    for prefix, module in (("network.", network), ("average.", averaged)):
        for name, value in own(module).items():
            value.copy_(found[prefix + name])
    for number, optimizer in enumerate(optimizers):
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in found.items():
            if name.startswith(f"optimizer.{number}."):
                _, _, index, key = name.split(".")
                states.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    done = progress(folder)
    return int(done["steps"]), 60 * done["minutes"]


def progress(folder: Path) -> dict[str, float]:
    """The steps and CPU minutes of the checkpoint in `folder`."""
    with safe_open(folder / "checkpoint.safetensors", "pt") as file:
        metadata = file.metadata()
    return {"steps": int(metadata["step"]), "minutes": float(metadata["seconds"]) / 60}
