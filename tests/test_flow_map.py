"""The flow_map objective: exact maps, each named part, and which networks move."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import (
    FOUR_JUMPS,
    GAUSSIAN,
    ONE_JUMP,
    AffineStudent,
    ExactFake,
    GaussianMap,
    M,
    Recorder,
    S,
    exact_networks,
    gaussian,
    gaussian_batch,
    mixed_teacher,
    one_loss,
    reached,
    square_growth,
    tiny_backbone,
    tiny_networks,
)
from torch import Tensor

from fastgen.batch import Conditioning
from fastgen.config import build_recipe, load_recipe
from fastgen.denoiser import Inputs
from fastgen.evaluation.evaluate import evaluate
from fastgen.flow.time_pairs import TimePairs
from fastgen.networks import Networks
from fastgen.objectives import FlowMap, Loss, MeanFlow
from fastgen.objectives.flow_map import GapTurn, OnPolicy
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy
from fastgen.sampling.sampler import load_sampler
from fastgen.schedule import TimeSampler
from fastgen.train import train

ROOT = Path(__file__).parents[1]
FORMS = ("lagrangian", "semigradient", "eulerian", "progressive")
PAIRS = TimePairs(diagonal=0.25)


@pytest.mark.parametrize("form", FORMS)
def test_the_exact_map_has_no_loss_from_a_teacher(form: Any) -> None:
    exact, growth = square_growth(FlowMap(form=form, pairs=PAIRS))
    assert exact < 1e-15 and 90 < growth < 110


def test_the_exact_map_has_no_loss_from_the_prior() -> None:
    exact, growth = square_growth(FlowMap(source="prior", pairs=TimePairs(diagonal=0.0)), ONE_JUMP)
    assert exact < 1e-15 and 90 < growth < 110


@pytest.mark.parametrize("form", FORMS)
def test_self_distillation_has_the_identity_without_a_teacher(form: Any) -> None:
    """Off the diagonal the exact map has no loss; on it, the loss is the conditional velocity's own spread, and its
    mean gradient at the exact map is zero (4 standard errors of 60 batches)."""
    objective, networks = FlowMap(form=form, teach="self", pairs=PAIRS), exact_networks()
    del networks.modules["teacher"]
    assert terms(objective, networks)["map"] < 1e-20
    if form != "semigradient":
        return
    gradients = []
    for key in range(60):
        loss = one_loss(objective, networks, gaussian_batch(key=key))
        gradients.append(float(torch.autograd.grad(loss, networks.student.off)[0]))  # type: ignore[arg-type]
    assert loss > 0.1
    found = torch.tensor(gradients)
    error = float(found.mean().abs() / (found.std() / 60**0.5))
    print(f"{error:.2f} standard errors")
    assert error < 4


def terms(objective: FlowMap, networks: Networks, key: int = 0) -> dict[str, Tensor]:
    loss = objective.loss(objective.turns(0, {})[-1], networks, gaussian_batch(key=key), {})
    assert isinstance(loss, Loss)
    return loss.terms


def test_the_diagonal_and_the_rest_are_told_apart() -> None:
    """A map that is exact on its diagonal alone has that term zero and the other not."""
    networks = exact_networks(GaussianMap(end=lambda t: t))
    for form in FORMS:
        found = terms(FlowMap(form=form, pairs=TimePairs(diagonal=0.5)), networks)
        assert found["diagonal"] < 1e-20 and found["map"] > 1e-3


def test_the_teachers_guidance_reaches_both_parts() -> None:
    """At w = 1 the exact map has no loss, and with other uncond rows at w = 2 it has."""
    networks, batch = exact_networks(), gaussian_batch(uncond=2)
    networks.modules["teacher"] = mixed_teacher()
    for scale, bound in ((1.0, (0, 1e-15)), (2.0, (1e-2, 1e9))):
        objective = FlowMap(guidance_scale=scale, pairs=TimePairs(diagonal=0.5))
        loss = objective.loss(objective.turns(0, {})[0], networks, batch, {})
        assert isinstance(loss, Loss)
        assert bound[0] <= loss.terms["map"] < bound[1] and bound[0] <= loss.terms["diagonal"] < bound[1]


def test_the_gap_grows_as_it_is_told() -> None:
    objective = FlowMap(pairs=TimePairs(diagonal=0.0, max_gap=0.8), gap_growth=4)
    gaps = [turn.max_gap for k in (0, 1, 3, 9) for turn in objective.turns(k, {}) if isinstance(turn, GapTurn)]
    assert gaps == pytest.approx([0.2, 0.4, 0.8, 0.8])
    student = Recorder(GaussianMap())
    one_loss(objective, exact_networks(student), gaussian_batch())
    assert max(float((call.t - call.inputs.s).detach().max()) for call in student.calls) <= 0.2 + 1e-12  # type: ignore[operator]


def test_the_differences_backend_is_close_to_the_derivative() -> None:
    networks, batch = exact_networks(0.05), gaussian_batch()
    found = [float(one_loss(FlowMap(derivative=d, pairs=PAIRS), networks, batch)) for d in ("jvp", "difference")]
    assert found[0] == pytest.approx(found[1], rel=1e-3) and found[0] != found[1]


# --- on policy


def policy_networks(off: float = 0.0, fake_off: float = 0.0) -> Networks:
    """The teacher, a student off its map, and a fake score whose law has another mean."""
    networks = exact_networks(off)
    networks.modules["fake_score"] = GaussianMap(fake_off)
    return networks


ON = OnPolicy(steps=(1, 3), renoise_time=TimeSampler(low=0.3, high=0.7))


def matching(config: OnPolicy, networks: Networks, residual: float = 1.0) -> tuple[Tensor, Tensor]:
    objective = FlowMap(on_policy=config)
    return objective.matching_loss(networks, gaussian_batch(), config, torch.tensor(residual, dtype=torch.float64))


@pytest.mark.parametrize("balance", [False, True])
def test_no_correction_where_the_fake_score_is_the_teacher(balance: bool) -> None:
    value, size = matching(dataclasses.replace(ON, balance=balance), policy_networks(off=0.1))
    assert float(size) < (1e-7 if balance else 1e-12) and value.requires_grad


@pytest.mark.parametrize("balance", [False, True])
def test_the_correction_widens_samples_that_are_too_narrow(balance: bool) -> None:
    """Samples m + 0.3 noise against data of 0.5, the fake score exact for them: descent spreads them. A flipped sign,
    or fake and teacher exchanged, narrows them."""
    student = AffineStudent(M, 0.3)  # from t = 1 in one jump
    networks = exact_networks(student)
    networks.modules["fake_score"] = ExactFake(student)
    config = dataclasses.replace(ON, steps=(1,), balance=balance)
    value, _ = matching(config, networks)
    assert float(torch.autograd.grad(value, student.b)[0]) < -1e-3


def test_balance_gives_the_correction_the_size_of_the_residual() -> None:
    sizes = [
        float(matching(dataclasses.replace(ON, balance=True), policy_networks(0.0, 0.1), r)[1]) for r in (1.0, 3.0)
    ]
    assert sizes[1] == pytest.approx(3 * sizes[0])


def test_the_correction_is_balanced_with_the_root_mean_square_of_the_residual() -> None:
    config = dataclasses.replace(ON, balance=True)
    objective, networks, batch = FlowMap(on_policy=config), policy_networks(0.1, 0.1), gaussian_batch()
    turn = objective.turns(0, {})[-1]
    assert isinstance(turn, GapTurn)
    residual, _ = objective.residuals(networks, batch, turn.max_gap)
    loss: Any = objective.loss(turn, networks, batch, {})
    _, size = objective.matching_loss(networks, batch, config, residual.detach().square().mean().sqrt())
    assert loss.terms["dm_grad"] == pytest.approx(float(size))


@pytest.mark.parametrize("dim", [2, 50])
def test_the_correction_is_a_sum_over_elements_as_the_map_is(dim: int) -> None:
    """The gradient of a sample is g / B, whatever the number of its elements."""
    batch = dataclasses.replace(gaussian_batch(count=16), latent_shape=(dim,))
    x = batch.normal("x").requires_grad_()

    class Given(FlowMap):
        def rollout(self, *unused: Any) -> Tensor:
            return x

    networks = Networks({"teacher": gaussian((0.3,) * dim, (S,) * dim)}, FOUR_JUMPS)
    networks.modules["fake_score"] = gaussian((M,) * dim, (S,) * dim)
    value, size = Given().matching_loss(networks, batch, OnPolicy(), torch.ones(()))
    value.backward()
    assert x.grad is not None
    assert float(len(x) * x.grad.abs().mean()) == pytest.approx(float(size))
    x.grad = None
    Given().matching_loss(networks, batch, OnPolicy(balance=True), torch.tensor(0.7))[0].backward()
    assert float(len(x) * x.grad.square().mean().sqrt()) == pytest.approx(0.7)  # the root mean square of the residual


def test_one_level_on_the_diagonal_has_the_law_of_one_draw() -> None:
    """A single draw is uniform, with mean 1/2; the larger of two has mean 2/3. Off the diagonal nothing changes."""
    batch = gaussian_batch(count=4000)
    single, larger = (TimePairs(diagonal=0.5, diagonal_level=level) for level in ("single", "larger"))  # type: ignore
    (t, s), (other_t, other_s) = single(batch), larger(batch)
    on_diagonal = other_t == other_s
    assert torch.equal(s == t, on_diagonal)
    assert float(t[on_diagonal].mean()) == pytest.approx(1 / 2, abs=0.02)
    assert float(other_t[on_diagonal].mean()) == pytest.approx(2 / 3, abs=0.02)
    assert torch.equal(t[~on_diagonal], other_t[~on_diagonal]) and torch.equal(s[~on_diagonal], other_s[~on_diagonal])


def test_the_rollout_of_the_exact_map_gives_exact_samples_with_gradient_in_all_jumps() -> None:
    lengths = set()
    for key in range(20):
        batch, student = gaussian_batch(key=key), Recorder(GaussianMap())
        x = FlowMap().rollout(exact_networks(student), batch, OnPolicy(steps=(1, 4)))
        assert torch.allclose(x, M + S * batch.normal("initial"), atol=1e-12)
        jumps = [(float(call.t[0]), float(call.inputs.s[0])) for call in student.calls]  # type: ignore[index]
        assert jumps[0][0] == 1.0 and jumps[-1][1] == 0.0 and all(a[1] == b[0] for a, b in itertools.pairwise(jumps))
        assert all(call.grad for call in student.calls)
        lengths.add(len(jumps))
    assert lengths == {1, 2, 3}


def test_each_turn_moves_its_own_networks() -> None:
    objective = FlowMap(on_policy=OnPolicy(steps=(2, 4), fake_updates=5), pairs=PAIRS)
    assert objective.trained_roles == ("student", "fake_score")
    networks = tiny_networks(objective, FOUR_JUMPS, backbone=tiny_backbone(GAUSSIAN))
    with torch.no_grad():
        for p in networks.student.parameters():
            p.add_(0.01 * torch.randn_like(p))
    for turn in objective.turns(0, {}):
        for m in networks.values():
            m.zero_grad()
        one_loss(objective, networks, gaussian_batch(), turn).backward()
        for role in ("student", "fake_score"):
            found = reached(networks[role])
            if role in turn.roles:
                assert {name for name in found if not found[name]} <= {"network.label.weight"}
            else:
                assert not any(found.values())
    assert [(turn.name, turn.updates) for turn in objective.turns(3, {})] == [("fake_score", 5), ("student", 1)]


# --- the recipe


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    recipe, one = str(ROOT / "recipes/mixture_flow_map_4step.yaml"), ["rollout.timesteps=[1.0]"]
    for text, lines in {
        "two_time: true": ["rollout.two_time=false"],
        "transition: ode": ["rollout.transition=renoise"],
        "one timestep": ["objective.source=prior"],
        "no data from which to learn": ["objective.source=prior", "objective.teach=self", "rollout.timesteps=[1.0]"],
        "without guidance": ["objective.teach=self", "objective.guidance_scale=3.0"],
        "pairs.diagonal": ["objective.form=progressive", "objective.pairs.diagonal=0"],
        "leave out pairs.time and pairs.to_zero": [*one, "objective.source=prior", "objective.pairs.to_zero=0.25"],
        "from t = 1 to uniform levels": [*one, "objective.source=prior", "objective.pairs.time.shift=5.0"],
        "let rollout.timesteps begin at 1": ["objective.on_policy={}", "rollout.timesteps=[0.9, 0.5]"],
    }.items():
        with pytest.raises(RecipeError, match=text):
            load_recipe(recipe, lines)
    raw = load_recipe(ROOT / "recipes/digits_flow_map_4step.yaml")
    assert raw.objective.name == "flow_map"
    with pytest.raises(RecipeError, match="differentiates a derivative"):
        load_recipe(
            ROOT / "recipes/digits_flow_map_4step.yaml",
            ["objective.form=lagrangian", "train.gradient_checkpointing=true"],
        )


@pytest.mark.slow
def test_a_short_run_learns_a_map_of_any_number_of_steps(tmp_path: Path) -> None:
    """A two-component mixture, 600 updates: more steps are better, and four are near the floor."""
    raw: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"),
        "backbone": {
            "name": "gaussian_mixture",
            "means": [[1.0, 0.0], [-1.0, 0.0]],
            "stds": [0.3, 0.3],
            "width": 64,
            "fit_steps": 300,
        },
        "rollout": {"timesteps": [1.0, 0.75, 0.5, 0.25], "transition": "ode", "two_time": True},
        "data": {"name": "mixture"},
        "objective": {"name": "flow_map", "pairs": {"diagonal": 0.25}},
        "optimizers": {"student": {"lr": 1e-3, "decay": "cosine", "weight_decay": 0.0}},
        "train": {"steps": 600, "batch_size": 256, "sample_every": 0, "checkpoint_every": 0, "log_every": 100},
        "eval": {"metrics": ["energy_distance"], "num_samples": 2000, "quick_num_samples": 2000, "batch_size": 2000},
    }
    recipe = build_recipe(raw)
    run = train(recipe)
    found = [
        evaluate(load_sampler(run, num_steps=n), recipe.eval, progress=False)["metrics"]["energy_distance"]
        for n in (1, 2, 4)
    ]
    print(found)
    assert found[2] < 0.01 and found[2] < found[0]


def test_a_policy_for_one_step_can_be_asked_for_more() -> None:
    assert ONE_JUMP.with_steps(3).timesteps == pytest.approx((1.0, 2 / 3, 1 / 3))
    assert RolloutPolicy((1.0,), "ode", two_time=True).any_step


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_divided_network_is_called_as_often_whatever_the_batch_holds(share: float) -> None:
    """Processes gather it together, and one may have only diagonal samples. The call that is not needed changes
    neither the loss nor its gradient."""

    class Divided(GaussianMap):
        divided, calls = True, 0

        def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
            self.calls += 1
            return super().call_network(x_t, t, cond, inputs)

        @property
        def is_sharded(self) -> bool:
            return self.divided

    found = []
    for divided in (True, False):
        for objective in (FlowMap(pairs=TimePairs(diagonal=share)), MeanFlow(pairs=TimePairs(diagonal=share))):
            student = Divided(0.1)
            student.divided = divided
            loss = one_loss(objective, exact_networks(student), gaussian_batch(8))
            found.append((float(loss), float(torch.autograd.grad(loss, student.off)[0]), student.calls))
    for own, plain in zip(found[:2], found[2:], strict=True):
        assert own[:2] == pytest.approx(plain[:2]) and own[2] >= plain[2]
    student = Divided(0.1)
    one_loss(FlowMap(pairs=PAIRS), exact_networks(student), gaussian_batch(8))
    assert student.calls == found[0][2]
