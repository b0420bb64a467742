"""Numbers that the authors' code gave on small tensors, and the comparison of ours with them.

A file tests/golden/NAME.safetensors holds the tensors that the authors' code was given, and what it returned: a loss,
a gradient, a list of levels. Its metadata name the repository, the commit and the function. A script in tools/golden
made it from a checkout of that repository; no code of it is here.

A comparison computes the same with fastgen. test_golden.py runs all of them, and docs/faithfulness.md lists them."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastgen.batch import Batch, Conditioning
from fastgen.denoiser import Denoiser, Inputs
from fastgen.schedule import FlowSchedule, PredictionType, Schedule

FOLDER = Path(__file__).parent / "golden"
CHANNELS, WIDTH = 4, 16
BOUND = 1e-5  # relative error, in float64


@dataclass(frozen=True)
class Golden:
    """One file. source: "owner/name@commit: path, function". Tensors are read by name, golden["x"]."""

    tensors: dict[str, Tensor]
    source: str

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


@dataclass(frozen=True)
class Comparison:
    """name: of the file and the row. quantity: what is compared. convention: how ours differs from the authors', as a
    sentence; empty if it does not. pair: (ours, theirs) from the file, after any factor that the convention states."""

    name: str
    objective: str
    quantity: str
    convention: str
    pair: Callable[[Golden], tuple[Tensor, Tensor]]

    def error(self) -> float:
        """|ours - theirs| / |theirs|, as Euclidean norms over all elements."""
        ours, theirs = self.pair(load_golden(self.name))
        assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
        ours, theirs = ours.detach().double(), theirs.double()
        assert theirs.norm() > 0
        return float((ours - theirs).norm() / theirs.norm())


COMPARISONS: dict[str, Comparison] = {}


def comparison(name: str, objective: str, quantity: str, convention: str = "") -> Callable[..., Callable[..., object]]:
    """Registers a function from a Golden to (ours, theirs) as a row of the table."""

    def register(pair: Callable[[Golden], tuple[Tensor, Tensor]]) -> Callable[[Golden], tuple[Tensor, Tensor]]:
        assert name not in COMPARISONS, name
        COMPARISONS[name] = Comparison(name, objective, quantity, convention, pair)
        return pair

    return register


def load_golden(name: str) -> Golden:
    with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return Golden(tensors, file.metadata()["source"])


def save_golden(name: str, tensors: dict[str, Tensor], repository: str, commit: str, function: str) -> None:
    """Used by the scripts of tools/golden. function: the path in the repository and the name of what was run."""
    FOLDER.mkdir(exist_ok=True)
    tensors = {key: value.detach().contiguous().clone() for key, value in tensors.items()}
    source = f"{repository}@{commit[:12]}: {function}"
    file = FOLDER / f"{name}.safetensors"
    save_file(tensors, file, metadata={"source": source})
    file.chmod(0o644)


# --- the network that both sides call


class GoldenNetwork(nn.Module):
    """A small network with a value and derivatives in everything it is given, in float64; any number of axes follows
    the channels. Authors' code and ours call the same formula:

        h = tanh(W1 x + b1 + t a + s d + C cond),  out = W2 (h + mean of h over positions)

    x [B, 4, ...], t and s [B] or broadcastable to x's positions, cond [B, 4]; s and cond may be left out."""

    def __init__(self, seed: int = 0, scale: float = 0.5):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(*shape, generator=generator, dtype=torch.float64))

        self.w1, self.w2 = parameter(WIDTH, CHANNELS), parameter(CHANNELS, WIDTH)
        self.b1, self.a, self.d = parameter(WIDTH), parameter(WIDTH), parameter(WIDTH)
        self.c = parameter(WIDTH, CHANNELS)

    def hidden(self, x: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None) -> Tensor:
        """The features, [B, 16, ...]."""

        def over_positions(value: Tensor) -> Tensor:  # [B, 16] -> [B, 16, 1, ...]
            return value.reshape(value.shape + (1,) * (x.dim() - 2))

        h = torch.einsum("hc,bc...->bh...", self.w1, x)
        h = h + over_positions(self.b1 + t.reshape(-1, 1) * self.a)
        if s is not None:
            h = h + over_positions(s.reshape(-1, 1) * self.d)
        if cond is not None:
            h = h + over_positions(cond @ self.c.T)
        h = torch.tanh(h)
        axes = tuple(range(2, x.dim()))
        return h + h.mean(axes, keepdim=True) if axes else h

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None) -> Tensor:
        return torch.einsum("ch,bh...->bc...", self.w2, self.hidden(x, t, cond, s))

    def flat(self) -> Tensor:
        """The gradients of all parameters as one vector; zeros where there is none."""
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters()]
        return torch.cat([part.flatten() for part in parts])


class GoldenDenoiser(Denoiser):
    """GoldenNetwork under fastgen's contract. t is given to the network as it is. cond["embedding"] is [B, 4]."""

    feature_dim = WIDTH

    def __init__(
        self,
        network: GoldenNetwork,
        prediction_type: PredictionType = "flow_prediction",
        schedule: Schedule | None = None,
    ):
        super().__init__(network, schedule or FlowSchedule(), prediction_type)

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        return self.network(x_t, t, cond.get("embedding"), inputs.s)


@dataclass(frozen=True)
class GivenBatch(Batch):
    """A batch whose draws are tensors of the file: given[name] is what normal(name), uniform(name) or integer(name)
    return. A draw that is not given raises KeyError."""

    given: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def normal(self, name: str, by_group: bool = False, rows: Tensor | None = None) -> Tensor:
        return self.given[name] if rows is None else self.given[name][rows]

    def uniform(self, name: str, by_group: bool = False, shape: tuple[int, ...] = ()) -> Tensor:
        return self.given[name]

    def integer(self, name: str, high: int) -> int:
        return int(self.given[name])


def given_batch(
    given: dict[str, Tensor],
    cond: Tensor,
    uncond: Tensor | None = None,
    latents: Tensor | None = None,
    **fields: object,
) -> GivenBatch:
    """A batch for GoldenDenoisers: cond and uncond [B, 4]; the draws and data in float64."""
    empty = torch.zeros_like(cond) if uncond is None else uncond
    shape = next(value.shape[1:] for value in (latents, *given.values()) if value is not None and value.dim() > 1)
    conditions = (Conditioning({"embedding": value}) for value in (cond, empty))
    ids = torch.arange(len(cond))
    return GivenBatch(ids, 0, *conditions, tuple(shape), latents=latents, dtype=torch.float64, given=given, **fields)
