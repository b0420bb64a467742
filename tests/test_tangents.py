"""What supports forward-mode differentiation at the installed torch, and the operators that stand in for it."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_pipelines import tiny_sd
from tiny_wan import tiny_wan
from torch import Tensor, nn
from torch.func import jvp
from torch.utils.checkpoint import checkpoint

from fastgen.backbones.base import Backbone
from fastgen.backbones.gaussian_mixture import GaussianMixtureConfig
from fastgen.backbones.sd import SDConfig
from fastgen.backbones.sd3 import SD3Config
from fastgen.backbones.wan import WanConfig
from fastgen.denoiser import Denoiser, Inputs
from fastgen.flow.tangents import difference, live_tangent, math_attention, tangent

F64 = torch.float64


class Attention(nn.Module):
    """A small network with time, normalisation and attention: [B, N, 8]."""

    def __init__(self, dropout: float = 0.0, recompute: str = ""):
        super().__init__()
        self.time, self.qkv, self.out = nn.Linear(1, 8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm, self.dropout, self.recompute = nn.LayerNorm(8), nn.Dropout(dropout), recompute
        self.double()

    def block(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(h)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return h + self.out(self.dropout(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = x + self.time(t[:, None])[:, None]
        if self.recompute:
            return checkpoint(self.block, h, use_reentrant=self.recompute == "reentrant")
        return self.block(h)


@pytest.fixture
def net() -> Attention:
    torch.manual_seed(0)
    return Attention()


def inputs() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x, v = (torch.randn(3, 5, 8, generator=generator, dtype=F64) for _ in range(2))
    return (x, torch.tensor([0.2, 0.5, 0.9], dtype=F64)), (v, torch.ones(3, dtype=F64))


def fine(fn, primals, tangents, h: float = 1e-6) -> Tensor:  # type: ignore[no-untyped-def]
    """The central difference in float64."""
    with torch.no_grad():
        ahead, behind = (fn(*(p + a * v for p, v in zip(primals, tangents, strict=True))) for a in (h, -h))
    return (ahead - behind) / (2 * h)


def off(found: Tensor, wanted: Tensor) -> float:
    error = float((found - wanted).abs().max() / wanted.abs().max())
    print(f"relative error {error:.1e}")
    return error


# --- the operators agree


@pytest.mark.parametrize("backend", ["jvp", "difference"])
def test_the_operators_agree_with_a_fine_difference(net: Attention, backend) -> None:  # type: ignore[no-untyped-def]
    primals, tangents = inputs()
    value, derivative = tangent(net, primals, tangents, backend, step=1e-4)
    assert off(derivative, fine(net, primals, tangents)) < (1e-6 if backend == "difference" else 1e-8)
    assert torch.allclose(value, net(*primals), atol=1e-12)
    assert not derivative.requires_grad and not value.requires_grad


def test_room_makes_one_sided_differences() -> None:
    """x^2 at 1: 2 by the central difference, 2 + h forward, 2 - h backward, by sample."""
    x, ones = torch.ones(3, 1, dtype=F64), torch.ones(3, 1, dtype=F64)
    room = (torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 1.0]))
    _, found = difference(lambda x: x**2, (x,), (ones,), 0.1, room)
    assert found.squeeze().tolist() == pytest.approx([2.0, 2.1, 1.9])


def test_an_embedding_that_oscillates_smooths_a_long_difference() -> None:
    """A wave of 1000 t has its derivative scaled by sin(1000 h) / (1000 h): 0.998 at 1e-4, -0.19 at 5e-3."""
    t, one = torch.tensor([0.3], dtype=F64), torch.ones(1, dtype=F64)
    exact = tangent(lambda t: torch.sin(1000 * t), (t,), (one,))[1]
    for h, factor in ((1e-4, 0.998), (1e-3, 0.84), (5e-3, -0.19)):
        found = difference(lambda t: torch.sin(1000 * t), (t,), (one,), h)[1]
        assert float(found / exact) == pytest.approx(factor, abs=2e-3)


def test_a_live_derivative_has_a_gradient(net: Attention) -> None:
    """d/dtheta of the derivative, against a fine difference of it along one parameter's direction."""
    primals, tangents = inputs()
    value, derivative = live_tangent(net, primals, tangents)
    direction = torch.randn(net.out.weight.shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    (grad,) = torch.autograd.grad((value + derivative).square().sum(), net.out.weight)
    found = []
    with torch.no_grad():
        for h in (1e-6, -1e-6):
            net.out.weight += h * direction
            found.append(float(sum(tangent(net, primals, tangents)).square().sum()))  # type: ignore[union-attr]
            net.out.weight -= h * direction
    assert float((grad * direction).sum()) == pytest.approx((found[0] - found[1]) / 2e-6, rel=1e-6)


def test_the_second_pass_draws_the_same_dropout() -> None:
    torch.manual_seed(0)
    net = Attention(dropout=0.5)
    primals, tangents = inputs()
    torch.manual_seed(5)
    value, derivative = tangent(net, primals, tangents)
    live = net(*primals)
    assert torch.equal(value, live.detach()) or torch.allclose(value, live, atol=1e-12)
    torch.manual_seed(5)
    again = tangent(net, primals, tangents, "difference", step=1e-5)[1]
    assert off(again, derivative) < 1e-6


# --- the rule table


def test_attention_has_a_forward_derivative_in_math_alone(net: Attention) -> None:
    primals, tangents = inputs()
    with pytest.raises((NotImplementedError, RuntimeError)):
        jvp(net, primals, tangents)
    with math_attention():
        assert off(jvp(net, primals, tangents)[1], fine(net, primals, tangents)) < 1e-8


@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention_has_none_without_math(training: bool) -> None:
    """In evaluation its fast path has none at all."""
    layer = nn.MultiheadAttention(8, 2, batch_first=True).double().train(training)
    x = torch.randn(2, 5, 8, dtype=F64)
    with pytest.raises((NotImplementedError, RuntimeError)), torch.no_grad():
        jvp(lambda x: layer(x, x, x, need_weights=False)[0], (x,), (torch.ones_like(x),))


LAYERS = {
    "linear": (nn.Linear(6, 4), (2, 6)),
    "conv2d": (nn.Conv2d(6, 4, 3), (2, 6, 5, 5)),
    "conv3d": (nn.Conv3d(6, 4, 3), (2, 6, 4, 4, 4)),
    "transposed": (nn.ConvTranspose2d(6, 4, 3), (2, 6, 5, 5)),
    "layer norm": (nn.LayerNorm(6), (2, 6)),
    "rms norm": (nn.RMSNorm(6), (2, 6)),
    "group norm": (nn.GroupNorm(2, 6), (2, 6, 5, 5)),
    "silu": (nn.SiLU(), (2, 6)),
    "gelu": (nn.GELU(), (2, 6)),
    "tanh gelu": (nn.GELU("tanh"), (2, 6)),
    "softplus": (nn.Softplus(), (2, 6)),
    "upsample": (nn.Upsample(scale_factor=2, mode="nearest"), (2, 6, 5, 5)),
    "pixel shuffle": (nn.PixelShuffle(2), (2, 8, 5, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_right_forward_derivatives(name: str) -> None:
    layer, shape = LAYERS[name]
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(shape, generator=generator, dtype=F64) for _ in range(2))
    layer = layer.double()
    assert off(tangent(layer, (x,), (v,))[1], fine(layer, (x,), (v,))) < 1e-7


def test_a_custom_function_needs_a_jvp_of_its_own() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(x):  # type: ignore[no-untyped-def, override]
            return x**2

        @staticmethod
        def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def, override]
            ctx.save_for_backward(inputs[0])
            ctx.save_for_forward(inputs[0])

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
            return 2 * ctx.saved_tensors[0] * grad

    class WithTangent(Square):
        @staticmethod
        def jvp(ctx, direction):  # type: ignore[no-untyped-def, override]
            return 2 * ctx.saved_tensors[0] * direction

    x = torch.randn(3, dtype=F64)
    with pytest.raises(RuntimeError):
        tangent(Square.apply, (x,), (torch.ones_like(x),))
    assert torch.allclose(tangent(WithTangent.apply, (x,), (torch.ones_like(x),))[1], 2 * x)


def test_checkpointing_and_forward_mode() -> None:
    """Reentrant fails; non-reentrant works under no_grad, and raises at the backward of a live derivative."""
    torch.manual_seed(0)
    primals, tangents = inputs()
    with pytest.raises(RuntimeError):
        tangent(Attention(recompute="reentrant"), primals, tangents)
    net = Attention(recompute="non-reentrant")
    assert off(tangent(net, primals, tangents)[1], fine(net, primals, tangents)) < 1e-8
    with pytest.raises(RuntimeError):
        live_tangent(net, primals, tangents)[1].sum().backward()


def test_silent_zeros() -> None:
    """Integer times, lookup tables and .detach() cut a tangent without a word; no_grad inside does not."""
    t, one = torch.tensor([0.3], dtype=F64), torch.ones(1, dtype=F64)
    table = nn.Embedding(10, 1).double()
    cut = {
        "long": lambda t: (10 * t).long().double() + 0 * t,
        "table": lambda t: table((10 * t).long()).squeeze(1) + 0 * t,
        "detach": lambda t: t.detach() ** 2 + 0 * t,
    }
    for name, fn in cut.items():
        assert tangent(fn, (t,), (one,))[1] == 0, name
    with torch.enable_grad():
        assert jvp(torch.no_grad()(lambda t: t**2), (t,), (one,))[1] == pytest.approx(0.6)


def test_expanded_inputs_are_copied() -> None:
    """Stride-0 primals and tangents crash in places; `tangent` copies them."""
    x = torch.randn(1, 3, dtype=F64).expand(4, 3)
    assert torch.allclose(tangent(lambda x: x**2, (x,), (torch.ones(1, 1, dtype=F64).expand(4, 3),))[1], 2 * x)


@pytest.mark.slow
def test_compiled_modules_and_forward_mode(net: Attention) -> None:
    """Around a compiled module func.jvp works and dual tensors do not."""
    compiled = torch.compile(net)
    primals, tangents = inputs()
    assert off(tangent(compiled, primals, tangents)[1], fine(net, primals, tangents)) < 1e-8


# --- networks with further inputs


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backbone]:
    cpu, root = torch.device("cpu"), tmp_path_factory.mktemp("tangents")
    configs = {
        "mixture": GaussianMixtureConfig(means=((0.0, 0.0),), stds=(1.0,), fit_steps=2, width=16, depth=1),
        "sd": SDConfig(path=str(tiny_sd(root / "sd"))),
        "sd3": SD3Config(path=str(Path(__file__).parents[1] / "assets/teachers/digits")),
        "wan": WanConfig(path=str(tiny_wan(root / "wan", layers=2)), height=32, width=32, num_frames=5),
        "wan2": WanConfig(path=str(tiny_wan(root / "wan2", 2, 0.5, layers=2)), height=32, width=32, num_frames=5),
    }
    return {name: config.build(cpu, torch.float32, 0) for name, config in configs.items()}


FAMILIES = ["mixture", "sd", "sd3", "wan", "wan2"]  # wan2: the two samples go to two experts


def extended(backbone: Backbone) -> Denoiser:
    student = backbone.load("student")
    student.add_inputs({}, backbone.time_dim, ("s", "guidance"))
    return student


def call_inputs(backbone: Backbone, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(2, *backbone.latent_shape, generator=generator, dtype=dtype) for _ in range(2))
    return {
        "x": x,
        "v": v,
        "t": torch.tensor([0.70037, 0.40021], dtype=dtype),
        "s": torch.tensor([0.2, 0.1], dtype=dtype),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_an_extended_network_starts_exactly_at_its_teacher(backbones: dict[str, Backbone], family: str) -> None:
    """Then, with weights in its branches, it depends on both inputs, but not where they are neutral: s = t, w = 1."""
    backbone = backbones[family]
    student, plain = extended(backbone), backbone.load("student")
    given = call_inputs(backbone, torch.float32)
    cond = backbone.encode_prompts(["", ""])

    def out(s: Tensor, w: float) -> Tensor:
        with torch.no_grad():
            return student(given["x"], given["t"], cond, Inputs(s=s, guidance=torch.full((2,), w)))

    with torch.no_grad():
        expected = plain(given["x"], given["t"], cond)
    assert torch.equal(out(given["s"], 4.0), expected)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "tables" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(out(given["t"], 1.0), expected)
    change = [float((out(s, w) - expected).abs().mean()) for s, w in ((given["s"], 1.0), (given["t"], 4.0))]
    print(change)
    assert min(change) > 1e-4
    with pytest.raises(ValueError, match="extra inputs"):
        student(given["x"], given["t"], cond)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_derivative_of_a_diffusers_network_is_right(
    backbones: dict[str, Backbone], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In x, t, s and the guidance scale together, and in s alone, against a difference in float64. diffusers embeds
    times (and Wan normalises) in float32 by `.float()`, whatever the weights are; here that is float64, too."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    backbone = backbones[family]
    student = extended(backbone).double()
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "tables" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    given, cond = call_inputs(backbone, F64), backbone.encode_prompts(["", ""])
    cond = type(cond)({k: v.double() if v.is_floating_point() else v for k, v in cond.items()})

    def u(x: Tensor, t: Tensor, s: Tensor, w: Tensor) -> Tensor:
        return student(x, t, cond, Inputs(s=s, guidance=w), predict="flow_prediction")

    w, one, zero = torch.full((2,), 3.0, dtype=F64), torch.ones(2, dtype=F64), torch.zeros(2, dtype=F64)
    primals = (given["x"], given["t"], given["s"], w)
    for directions in ((given["v"], one, 0.5 * one, one), (0 * given["v"], zero, one, zero)):
        found = tangent(u, primals, directions)[1]
        assert found.abs().mean() > 1e-5
        assert off(found, fine(u, primals, directions, 1e-7)) < 1e-5


def test_a_wan_student_takes_a_pair_of_levels_a_frame(backbones: dict[str, Backbone]) -> None:
    """Equal pairs in all frames are one pair; the frame that differs changes the output; its JVP is right."""
    backbone = backbones["wan"]
    student = extended(backbone)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "tables" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    given, cond = call_inputs(backbone, torch.float32), backbone.encode_prompts(["a cat", "a dog"])
    frames = backbone.latent_shape[0]

    def u(t: Tensor, s: Tensor) -> Tensor:
        return student(given["x"], t, cond, Inputs(s=s, guidance=torch.ones_like(t)), predict="flow_prediction")

    t, s = (given[name][:, None].expand(-1, frames).clone() for name in "ts")
    with torch.no_grad():
        once, by_frame = u(given["t"], given["s"]), u(t, s)
        assert off(by_frame, once) < 1e-5
        s[:, 1] = t[:, 1]
        assert off(u(t, s), once) > 1e-3
    directions = (torch.zeros_like(t), torch.zeros_like(s).index_fill(1, torch.tensor([0]), 1.0))
    found = tangent(u, (t, s), directions)[1]
    assert found.abs().mean() > 1e-5 and off(found, fine(u, (t, s), directions, 5e-3)) < 3e-2
