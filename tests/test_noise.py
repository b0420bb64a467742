"""The random numbers: a function of (key, sample id, element) and of nothing else, with the right law."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from fastgen import noise
from fastgen.batch import Batch, Conditioning

SHAPES = [(), (1,), (2,), (3,), (4, 3), (2, 3, 5)]
MASK = (1 << 64) - 1


def splitmix(z: int) -> int:
    """The finaliser of SplitMix64 in Python integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def batch_of(ids: Tensor, key: int, **fields: Tensor) -> Batch:
    return Batch(ids=ids, key=key, cond=Conditioning(), uncond=Conditioning(), latent_shape=(3,), **fields)


def test_the_stream_is_splitmix64_of_its_coordinates() -> None:
    """Each uniform draw is the SplitMix64 hash of (id, key, element), computed here in Python integers: on every
    machine the same, also for negative keys and ids beyond 2^32."""
    golden, worst = 0x9E3779B97F4A7C15, 0.0
    for key in (0, 5, noise.make_key("a"), noise.make_key("b"), -(2**63)):
        ids = torch.tensor([0, 1, 2, 17, 2**32 + 1, 2**62])
        drawn = noise.uniform(ids, (4,), key, torch.float64)
        for row, i in enumerate(ids.tolist()):
            for e in range(4):
                hashed = splitmix(splitmix((splitmix((i * golden + key) & MASK) + (e + 1) * golden) & MASK))
                worst = max(worst, abs(drawn[row, e].item() - ((hashed >> 11) + 0.5) * 2.0**-53))
    print(f"largest difference from Python integers {worst:.1e}")
    assert worst == 0


def test_normal_is_box_muller_of_the_uniform_stream() -> None:
    """sqrt(-2 log u) cos(2 pi w), then the sines, with u and w the first and second half of the uniform draws."""
    ids, key = torch.arange(50), noise.make_key("normal")
    u, z = noise.uniform(ids, (4,), key, torch.float64).tolist(), noise.normal(ids, (3,), key, torch.float64)
    worst = 0.0
    for row, (a, b, c, d) in enumerate(u):
        first, second = math.sqrt(-2 * math.log(a)), math.sqrt(-2 * math.log(b))
        exact = (first * math.cos(math.tau * c), second * math.cos(math.tau * d), first * math.sin(math.tau * c))
        worst = max(worst, *(abs(x - y) for x, y in zip(exact, z[row].tolist(), strict=True)))
    print(f"largest difference {worst:.1e}")
    assert worst < 1e-14


def test_keys_are_the_same_in_every_process() -> None:
    """A key is a fixed hash of its parts (Python's own hash of a string changes from process to process), and parts
    are not merely concatenated."""
    assert noise.make_key(0, 1, "student", 2) == -8492521716325343299
    assert noise.make_key("ab", "c") != noise.make_key("a", "bc")
    assert noise.make_key(1, 2) != noise.make_key(2, 1)
    assert noise.make_key("1") != noise.make_key(1)
    assert all(-(2**63) <= noise.make_key(i) < 2**63 for i in range(100))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("draw", [noise.normal, noise.uniform])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_draw_is_the_same_alone_in_a_batch_and_in_another_order(draw, shape, dtype) -> None:
    """Bit for bit."""
    ids, key = torch.randint(0, 10**12, (65,), generator=torch.Generator().manual_seed(0)), noise.make_key("x")
    together = draw(ids, shape, key, dtype)
    alone = torch.cat([draw(i[None], shape, key, dtype) for i in ids])
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))
    assert together.shape == (65, *shape) and together.dtype == dtype
    assert torch.equal(together, alone)
    assert torch.equal(together[order], draw(ids[order], shape, key, dtype))


def test_names_keys_ids_and_elements_are_independent() -> None:
    """Streams of other names, keys, neighbouring ids and neighbouring elements are uncorrelated, and so are their
    squares: every correlation of 200,000 pairs is within 4.5 standard errors of 0."""
    n = 200_000
    ids = torch.arange(n)
    batch, other = batch_of(ids, noise.make_key(0, 0)), batch_of(ids, noise.make_key(0, 1))
    a = batch.normal("initial").double()
    streams = {
        "another name": batch.normal("step1").double(),
        "another key": other.normal("initial").double(),
        "the next id": batch_of(ids + 1, batch.key).normal("initial").double(),
        "consecutive keys": noise.normal(ids, (3,), 8, torch.float64),
    }
    first = dict.fromkeys(streams, a) | {"consecutive keys": noise.normal(ids, (3,), 7, torch.float64)}
    pairs = [(name, first[name][:, i], streams[name][:, j]) for name in streams for i in range(3) for j in range(3)]
    pairs += [("elements", a[:, i], a[:, j]) for i in range(3) for j in range(i)]
    worst = 0.0
    for name, x, y in pairs:
        for f, g in ((x, y), (x**2, y**2), (x, y**2)):
            r = torch.corrcoef(torch.stack([f, g]))[0, 1].item() * math.sqrt(n)
            assert abs(r) < 4.5, (name, r)
            worst = max(worst, abs(r))
    print(f"largest correlation {worst:.2f} standard errors, of {3 * len(pairs)}")


@pytest.mark.parametrize("by", ["ids", "elements", "keys"])
def test_normal_has_the_moments_and_the_law_of_a_standard_normal(by: str) -> None:
    """Mean, variance, fourth moment and Kolmogorov-Smirnov distance of 1e6 draws, along each coordinate of the stream,
    within 4 standard errors (the distance within its 99.9 % point)."""
    n = 1_000_000
    if by == "ids":
        z = noise.normal(torch.arange(n), (), noise.make_key("moments"), torch.float64)
    elif by == "elements":
        z = noise.normal(torch.tensor([3]), (n,), noise.make_key("moments"), torch.float64).flatten()
    else:
        ids = torch.arange(10_000)
        z = torch.cat([noise.normal(ids, (), noise.make_key("moments", k), torch.float64) for k in range(100)])
    scaled = math.sqrt(n) * torch.stack(
        [z.mean(), (z.square().mean() - 1) / math.sqrt(2), ((z**4).mean() - 3) / math.sqrt(96)]
    )
    cdf, rank = torch.special.ndtr(z.sort().values), torch.arange(n, dtype=torch.float64)
    distance = math.sqrt(n) * max((cdf - rank / n).max().item(), ((rank + 1) / n - cdf).max().item())
    print(f"mean, variance, fourth moment in standard errors {scaled.tolist()}; sqrt(n) KS {distance:.3f}")
    assert scaled.abs().max() < 4
    assert distance < 1.95


def test_uniform_has_the_law_of_a_uniform() -> None:
    n = 1_000_000
    u = noise.uniform(torch.arange(n), (), noise.make_key("uniform"), torch.float64).sort().values
    rank = torch.arange(n, dtype=torch.float64)
    distance = math.sqrt(n) * max((u - rank / n).max().item(), ((rank + 1) / n - u).max().item())
    print(f"sqrt(n) KS {distance:.3f}, range {u[0].item():.2e} .. 1 - {1 - u[-1].item():.2e}")
    assert distance < 1.95


def test_uniform_never_reaches_its_ends() -> None:
    """In (0, 1) in float32 too: this sample's float64 draw, 1 - 5.9e-9, would round to 1."""
    ids, key = torch.tensor([14547511]), noise.make_key("rounding")
    double = noise.uniform(ids, (), key, torch.float64).item()
    single = noise.uniform(ids, (), key).item()
    print(f"float64 1 - {1 - double:.2e}, float32 1 - {1 - single:.2e}")
    assert 0 < double < 1 and torch.tensor(double).item() == 1.0
    assert 0 < single < 1


@pytest.mark.parametrize("draw", [noise.normal, noise.uniform])
def test_float32_is_the_rounded_float64_stream(draw) -> None:
    ids, key = torch.arange(10_000), noise.make_key("dtype")
    double, single = draw(ids, (3,), key, torch.float64), draw(ids, (3,), key)
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    assert torch.equal(double.float(), single)


@pytest.mark.parametrize("high", [1, 2, 4, 7, 50])
def test_integer_covers_its_range_evenly_over_keys(high: int) -> None:
    """Chi-square of 20,000 keys below its 99.9 % point; the same key always gives the same integer."""
    keys = [noise.make_key(seed, step, "student", 0) for seed in range(4) for step in range(5000)]
    drawn = [noise.integer(high, noise.make_key(k, "stop")) for k in keys]
    counts = torch.bincount(torch.tensor(drawn), minlength=high).double()
    expected = len(keys) / high
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    print(f"chi-square {chi_square:.1f} with {high - 1} degrees of freedom")
    assert len(counts) == high
    assert high == 1 or chi_square < stats.chi2.ppf(0.999, high - 1)
    assert noise.integer(high, 12) == noise.integer(high, 12)


def test_a_draw_by_group_is_shared_by_the_group() -> None:
    """Rows of one group share their draw, across groups they differ; without groups it is refused."""
    batch = batch_of(torch.arange(6), 1, group=torch.tensor([4, 4, 9, 9, 9, 4]))
    z, u = batch.normal("g", by_group=True), batch.uniform("g", by_group=True)
    for drawn in (z, u):
        assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[5])
        assert torch.equal(drawn[2], drawn[4]) and not torch.equal(drawn[0], drawn[2])
    with pytest.raises(ValueError, match=r"Batch\.group"):
        batch_of(torch.arange(6), 1).normal("g", by_group=True)


def test_the_shared_integer_does_not_depend_on_the_samples() -> None:
    """Ranks and micro-batches hold other ids and agree on the choice."""
    for name in ("stop", "phase"):
        assert batch_of(torch.arange(3), 5).integer(name, 1000) == batch_of(torch.arange(90, 99), 5).integer(
            name, 1000
        )
