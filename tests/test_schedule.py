"""Noise schedules: definitions, conversions, renoising and laws of times, against closed forms and diffusers."""

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from fastgen.schedule import FlowSchedule, Schedule, TimeSampler, VPSchedule, expand

KINDS = ["sample", "epsilon", "v_prediction", "flow_prediction"]


@pytest.fixture(params=["flow", "vp"])
def schedule(request: pytest.FixtureRequest, vp_schedule: VPSchedule) -> Schedule:
    return FlowSchedule() if request.param == "flow" else vp_schedule


@pytest.fixture(scope="module")
def scheduler() -> DDPMScheduler:
    return DDPMScheduler(1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def draws(count: int, dtype: torch.dtype, low: float = 0.02, high: float = 0.98) -> tuple[Tensor, Tensor, Tensor]:
    """x0, noise [count, 2, 3] and times from low to high."""
    generator = torch.Generator().manual_seed(0)
    x0 = 2 * torch.randn(count, 2, 3, generator=generator, dtype=torch.float64) + 0.5
    noise = torch.randn(count, 2, 3, generator=generator, dtype=torch.float64)
    return x0.to(dtype), noise.to(dtype), torch.linspace(low, high, count, dtype=torch.float64).to(dtype)


def truth(schedule: Schedule, kind: str, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """What a perfect network of each kind outputs, by definition."""
    alpha, sigma = schedule.coefficients(t, x0)
    return {
        "sample": x0,
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * x0,
        "flow_prediction": noise - x0,
    }[kind]


def largest(difference: Tensor) -> float:
    return difference.abs().max().item()


@pytest.mark.parametrize("kind", KINDS)
def test_definitions_recover_the_true_sample_and_back(schedule: Schedule, kind: str) -> None:
    """v = noise - x0 and v = alpha noise - sigma x0 are recovered from the true (x0, noise), and x0 from them."""
    x0, noise, t = draws(97, torch.float64)
    x_t = schedule.add_noise(x0, noise, t)
    target = truth(schedule, kind, x0, noise, t)
    forward = largest(schedule.from_sample(x0, x_t, t, kind) - target)
    backward = largest(schedule.to_sample(target, x_t, t, kind) - x0)
    print(f"{kind}: from_sample {forward:.1e}, to_sample {backward:.1e}")
    assert forward < 1e-12 and backward < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_conversions_round_trip(schedule: Schedule, kind: str, dtype: torch.dtype, tolerance: float) -> None:
    """to_sample inverts from_sample for any x_t, not only for a noised x0. The error is relative to the larger of the
    sample and x_t / alpha, whose cancellation float32 cannot avoid."""
    x0, x_t, t = draws(97, dtype)
    back = schedule.to_sample(schedule.from_sample(x0, x_t, t, kind), x_t, t, kind)
    alpha, _ = schedule.coefficients(t, x_t)
    scale = torch.maximum(x0.abs().amax((1, 2), True), x_t.abs().amax((1, 2), True) / alpha)
    error = largest((back - x0) / scale)
    print(f"{kind}, {dtype}: {error:.1e}")
    assert back.dtype == dtype and error < tolerance


def test_low_precision_is_converted_in_float32(schedule: Schedule) -> None:
    """bfloat16 inputs give the float32 result for these inputs: coefficients are never rounded to bfloat16."""
    x0, noise, t = draws(97, torch.bfloat16)
    exact = schedule.add_noise(x0.float(), noise.float(), t.float())
    assert schedule.add_noise(x0, noise, t).dtype == torch.float32
    assert torch.equal(schedule.add_noise(x0, noise, t), exact)
    assert schedule.to_sample(noise, x0, t, "epsilon").dtype == torch.float32


def test_score_differences_agree_across_spaces(schedule: Schedule) -> None:
    """s_f - s_r = alpha / sigma^2 (mu_f - mu_r) = -(eps_f - eps_r) / sigma = alpha / sigma (v_r - v_f) in flow
    matching (on the flow schedule) and = (v_r - v_f) alpha / sigma with v = alpha eps - sigma x0 (variance
    preserving)."""
    fake, real, t = draws(97, torch.float64)
    x_t = torch.randn(fake.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    alpha, sigma = schedule.coefficients(t, x_t)
    difference = schedule.score(fake, x_t, t) - schedule.score(real, x_t, t)

    def gap(kind: str) -> Tensor:
        return schedule.from_sample(fake, x_t, t, kind) - schedule.from_sample(real, x_t, t, kind)

    kind = "flow_prediction" if isinstance(schedule, FlowSchedule) else "v_prediction"
    others = {
        "sample": alpha / sigma**2 * gap("sample"),
        "epsilon": -gap("epsilon") / sigma,
        kind: -alpha / sigma * gap(kind),
    }
    for name, other in others.items():
        error = largest((other - difference) / difference.abs().clamp_min(1))
        print(f"{name}: {error:.1e}")
        assert error < 1e-11


def test_the_score_of_a_gaussian_is_closed_form(schedule: Schedule) -> None:
    """For data N(m, S) the score at level t is -(x - alpha m) / V with V = alpha^2 S + sigma^2."""
    x_t, _, t = draws(97, torch.float64)
    alpha, sigma = schedule.coefficients(t, x_t)
    m, s = 0.7, 1.3
    v = alpha**2 * s + sigma**2
    posterior_mean = m + alpha * s / v * (x_t - alpha * m)
    error = largest(schedule.score(posterior_mean, x_t, t) + (x_t - alpha * m) / v)
    print(f"{error:.1e}")
    assert error < 1e-10


def test_renoise_composes_to_the_law_of_the_higher_level(schedule: Schedule) -> None:
    """0 -> s -> t has mean coefficient alpha_t and variance sigma_t^2, and so has s -> r -> t from s."""
    t = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    t, s = torch.meshgrid(t, torch.linspace(0, 1, 9, dtype=torch.float64), indexing="ij")
    t, s = t.flatten(), (t * s).flatten()
    like = torch.zeros(len(t), 1, dtype=torch.float64)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule.coefficients(s, like), schedule.coefficients(t, like)
    ratio, sigma = schedule.renoise_coefficients(s, t, like)
    r = (s + t) / 2
    first, second = schedule.renoise_coefficients(s, r, like), schedule.renoise_coefficients(r, t, like)
    errors = {
        "mean": largest(ratio * alpha_s - alpha_t),
        "variance": largest((ratio * sigma_s) ** 2 + sigma**2 - sigma_t**2),
        "mean of two": largest(second[0] * first[0] - ratio),
        "variance of two": largest((second[0] * first[1]) ** 2 + second[1] ** 2 - sigma**2),
    }
    print(errors)
    assert max(errors.values()) < 1e-12


def test_renoise_from_a_clean_sample_is_add_noise_and_to_the_same_level_nothing(schedule: Schedule) -> None:
    """s = 0 reduces to add_noise, and t = s returns x_s."""
    x, noise, t = draws(97, torch.float64)
    assert largest(schedule.renoise(x, noise, torch.zeros_like(t), t) - schedule.add_noise(x, noise, t)) < 1e-12
    assert largest(schedule.renoise(x, noise, t, t) - x) < 1e-6  # a difference of equal squares under a root


def test_renoise_downwards_is_refused(schedule: Schedule) -> None:
    """Even where a single sample goes down."""
    x, noise, t = draws(5, torch.float64)
    with pytest.raises(ValueError, match="t >= s"):
        schedule.renoise(x, noise, t, torch.where(torch.arange(5) == 3, t - 0.01, t))


def test_ends_and_monotony(schedule: Schedule) -> None:
    """alpha(0) = 1 and sigma(0) = 0 exactly; the signal-to-noise ratio falls strictly; time per frame broadcasts."""
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert alpha[0] == 1 and sigma[0] == 0
    assert (alpha.diff() < 0).all() and (sigma.diff() > 0).all()
    frames = t[:6].reshape(2, 3)
    assert expand(frames, torch.zeros(2, 3, 4, 5)).shape == (2, 3, 1, 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_vp_equals_diffusers_at_discrete_steps(scheduler: DDPMScheduler, dtype: torch.dtype, tolerance: float) -> None:
    """At level (i + 1) / N: add_noise is DDPMScheduler's at step i, alpha^2 + sigma^2 = 1, and the network is told i.

    float32 differs by the rounding of alpha^2, as diffusers' own float32 does from its float64."""
    schedule = VPSchedule(scheduler.alphas_cumprod)
    steps = torch.arange(1000)
    t = ((steps + 1).double() / 1000).to(dtype)
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 1000, 3, generator=generator, dtype=torch.float64).to(dtype)
    ours, theirs = schedule.add_noise(x0, noise, t), scheduler.add_noise(x0, noise, steps)
    told = schedule.network_time(t)
    identity = largest(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2 - 1)
    errors = [largest(ours - theirs), largest(told - steps), identity]
    print(f"{dtype}: add_noise {errors[0]:.1e}, network_time {errors[1]:.1e}, alpha^2 + sigma^2 - 1 {errors[2]:.1e}")
    assert errors[0] < tolerance and errors[2] < tolerance
    assert errors[1] < (1e-9 if dtype == torch.float64 else 1e-4)
    assert torch.equal(told.round().long(), steps)


def test_vp_velocity_equals_diffusers(scheduler: DDPMScheduler) -> None:
    """v_prediction is DDPMScheduler.get_velocity."""
    schedule = VPSchedule(scheduler.alphas_cumprod)
    steps = torch.arange(0, 1000, 7)
    t = (steps + 1).double() / 1000
    x0, noise = torch.randn(2, len(t), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = schedule.from_sample(x0, schedule.add_noise(x0, noise, t), t, "v_prediction")
    error = largest(ours - scheduler.get_velocity(x0, noise, steps))
    print(f"{error:.1e}")
    assert error < 1e-12


def test_vp_between_steps_is_linear_in_alpha_squared(vp_schedule: VPSchedule, sd_betas: Tensor) -> None:
    """Half-way between two steps alpha^2 is their mean, also between step 0 and clean data."""
    table = torch.cat([torch.ones(1, dtype=torch.float64), (1 - sd_betas).cumprod(0)])
    middle = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    error = largest(vp_schedule.alpha_squared(middle) - (table[:-1] + table[1:]) / 2)
    print(f"{error:.1e}")
    assert error < 1e-13
    assert vp_schedule.network_time(torch.zeros(1)).item() == 0


def test_small_vp_noise_levels_keep_their_precision_in_float32(vp_schedule: VPSchedule) -> None:
    """sigma(t) in float32 is the rounded float64 sigma(t) of the same t, also where alpha^2 is nearly 1."""
    t = torch.linspace(1e-3, 0.1, 500)
    exact = vp_schedule.sigma(t.double())
    error = largest((vp_schedule.sigma(t).double() - exact) / exact)
    print(f"relative {error:.1e}")
    assert error < 2e-7


def test_flow_networks_see_a_thousand_times_t() -> None:
    t = torch.tensor([0.0, 0.25, 1.0])
    assert torch.equal(FlowSchedule().network_time(t), torch.tensor([0.0, 250.0, 1000.0]))


U = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000


@pytest.mark.parametrize("law", ["uniform", "logit_normal"])
@pytest.mark.parametrize("shift", [0.3, 1.0, 5.0])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.02, 0.98), (0.5, 0.6)])
def test_times_are_increasing_and_within_their_range(law: str, shift: float, low: float, high: float) -> None:
    """t is a strictly increasing function of u, inside [low, high], and fills it; float32 draws too."""
    sampler = TimeSampler(law=law, low=low, high=high, shift=shift)
    for u in (U, U[::10].float(), torch.tensor([1e-12, 1 - 2**-24])):
        t = sampler(u)
        assert t.shape == u.shape and t.dtype == u.dtype
        assert (t.diff() > 0).all() if u.dtype == torch.float64 else (t.diff() >= 0).all()
        assert t.min() >= torch.tensor(low, dtype=t.dtype) and t.max() <= torch.tensor(high, dtype=t.dtype)
    t = sampler(U)
    assert t[0] < low + 0.06 * (high - low) and t[-1] > high - 0.06 * (high - low)


def test_uniform_times_have_the_moments_of_a_uniform() -> None:
    t = TimeSampler(low=0.02, high=0.98)(U)
    assert abs(t.mean().item() - 0.5) < 1e-9 and abs(t.var().item() - 0.96**2 / 12) < 1e-5


def test_shift_is_the_resolution_shift() -> None:
    """t' = s t / (1 + (s - 1) t): it multiplies the odds t / (1 - t) by s, so a shift up raises every time."""
    for shift in (0.3, 3.0, 5.0):
        t = TimeSampler(low=0, high=1, shift=shift)(U)
        error = largest(t / (1 - t) / (U / (1 - U)) - shift)
        print(f"shift {shift}: odds ratio off by {error:.1e}")
        assert error < 1e-7
        assert ((t > U) if shift > 1 else (t < U)).all()


def test_logit_normal_has_its_moments() -> None:
    """logit(t) ~ N(mean, std^2): its mean and std over a fine grid of u, and the median sigmoid(mean)."""
    t = TimeSampler(law="logit_normal", low=0, high=1, mean=-0.4, std=1.3)(U)
    logit = t.logit()
    print(f"mean {logit.mean():.6f}, std {logit.std():.6f}")
    assert abs(logit.mean().item() + 0.4) < 1e-4 and abs(logit.std().item() - 1.3) < 1e-3
    assert abs(t.median().item() - 1 / (1 + math.exp(0.4))) < 1e-4


@pytest.mark.parametrize(
    ("df", "share"),
    [(1.0, lambda x: math.atan(x) / math.pi), (2.0, lambda x: x / (2 * (2 + x * x) ** 0.5))],
    ids=["Cauchy", "two"],
)
def test_log_student_t_is_that_law_between_its_ends(df: float, share: Callable[[float], float]) -> None:
    """The shares of Student's t are closed forms for one and for two degrees of freedom; rank is the inverse, and
    sigma_data moves the levels as those of logit_normal."""
    sampler = TimeSampler(law="log_student_t", low=0.3, high=0.99, mean=-0.4, std=0.7, sigma_data=0.5, df=df)
    t = sampler(U[::100])
    place = ((t.logit() + math.log(0.5) + 0.4) / 0.7).tolist()
    ends = [(math.log(0.5 * x / (1 - x)) + 0.4) / 0.7 for x in (0.3, 0.99)]
    wanted = torch.tensor([(share(x) - share(ends[0])) / (share(ends[1]) - share(ends[0])) for x in place])
    print(largest(wanted - U[::100]), largest(sampler.rank(t) - U[::100]))
    assert largest(wanted - U[::100]) < 1e-5 and largest(sampler.rank(t) - U[::100]) < 1e-9
    assert (t.diff() > 0).all() and t.min() >= 0.3 and t.max() <= 0.99
    inside = sampler(U[::100], (torch.full_like(t, 0.4), torch.full_like(t, 0.5)))
    assert inside.min() >= 0.4 - 1e-5 and inside.max() <= 0.5 + 1e-5


def test_tcms_law_is_nearly_uniform_in_the_logarithm_of_log_sigma() -> None:
    """df 0.01 and scale 0.2 from sigma = 1 to 80: scipy's stats.t gives these quantiles of sigma."""
    from scipy import stats

    sampler = TimeSampler(law="log_student_t", low=2 / 3, high=160 / 161, mean=0.0, std=0.2, sigma_data=0.5, df=0.01)
    u = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    top = stats.t.cdf(math.log(80) / 0.2, 0.01)
    wanted = torch.tensor(stats.t.ppf(0.5 + u.numpy() * (top - 0.5), 0.01) * 0.2).exp()
    t = sampler(u)
    assert torch.allclose(0.5 * t / (1 - t), wanted, rtol=1e-4), (0.5 * t / (1 - t), wanted)


@pytest.mark.parametrize(
    "fields",
    [{"low": 0.5, "high": 0.5}, {"low": 0.9, "high": 0.2}, {"low": -0.1}, {"high": 1.1}, {"shift": 0}, {"std": 0}],
)
def test_impossible_time_laws_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        TimeSampler(**fields)


def test_log_student_t_refuses_what_it_does_not_use() -> None:
    for text, fields in {
        "needs df": {"df": None},
        "neither shift nor ends": {"shift": 2.0},
        "inside": {"high": 1.0},
        "and ends clamp": {"ends": "clamp"},
    }.items():
        with pytest.raises(ValueError, match=text):
            TimeSampler(**({"law": "log_student_t", "df": 0.01} | fields))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="other laws take none"):
        TimeSampler(df=1.0)


def test_renoising_from_pure_noise_is_refused() -> None:
    one = torch.ones(2)
    with pytest.raises(ValueError, match="some signal left"):
        FlowSchedule().renoise(torch.randn(2, 3), torch.randn(2, 3), one, one)
