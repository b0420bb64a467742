"""Consistency distillation and training: every point of a trajectory of the ODE is sent to the trajectory's end.

    paper               here                  what it is
    f_theta(x, t)       networks.student      its clean prediction; x itself at t = 0, by the path alone
    f_theta^-           networks.target       a moving average of the student (target_decay), or the student itself
    t_{n+1}, t_n        t, s                  neighbours: `grid` (CM, iCT, LCM), or `shrinking` (ECT)
    Phi(x, t_{n+1})     x_s                   one step of a solver along the guided teacher (distillation, CD)
    x + t_n z           x_s                   the same data and noise at level s (training, CT)
    omega               scale                 guidance scale drawn for each sample, and an input of the student
                                              (rollout.embedded_guidance)
    s_m, t_b            phase_edges(t)        lower edge of the phase t is in (PCM, Hyper-SD)
    t_end               end                   where both are sent: 0, an edge, or anywhere between edge and s

The algorithm, for every student update:
    t, s from the law of pairs of this update, s not below the edge of t's phase;  x_t from data and noise
    x_s = a step of the teacher from x_t (CD), or data and the same noise at s (CT)
    student <- w d(step of f(x_t, t) to end,  sg[step of f^-(x_s, s) to end]),   d(a, b) = |a - b| (pseudo-Huber)
               (+ an adversarial term, PCM's; the discriminator has its turn before)
    the target network, if there is one, and the average of the student's weights move, once.
A step of f to `end` is the ode step with its clean prediction, and to 0 that prediction.

The papers, by what a recipe sets:
    CM     arXiv 2303.01469  CD: grid {count: 18, spacing: karras}, solver heun, target_decay 0.95
                             CT: teach data, grid {count: 1, last: 150, spacing: karras}, target_decay 0.9, square
    iCT    arXiv 2310.14189  teach data, grid {count: 10, last: 1280, growth: doubling, spacing: karras, time: ...},
                             weight gap, huber 0.00054
    ECT    arXiv 2406.14548  teach data, shrinking, weight gap, huber 0; it starts from a diffusion model, as all here
    LCM    arXiv 2310.04378  grid {count: 50}, guidance_range [6, 16], rollout.embedded_guidance, target_decay 0.95;
                             LCM-LoRA (2311.05556): lora.student, no target network, and the student is told nothing
    PCM    arXiv 2405.18407  grid {count: 100}, phases [4], rollout ode from edge to edge
    TSCD   arXiv 2404.13686  phases [8, 4, 2, 1], end uniform, rollout tcd

The optimum depends on the grid: n intervals of Euler steps, or of data, leave too little variance (a Gaussian of std
0.5 gets 0.34 at n = 4, 0.456 at 16 and 0.494 at 128); solver heun and growing grids lessen it. The network is not
told `end`, so that TSCD's jumps between edges are approximate (flow_map has students that are inputs).

Departures: paths end at exactly 0, where no c_skip and c_out are needed (LCM's are 0 and 1 but for the last levels);
levels are the teacher's own, noise-to-signal ratios are t / (1 - t), and gaps are of levels; no LPIPS.
"""

from dataclasses import dataclass as plain_dataclass
from typing import Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen import signals
from fastgen.backbones.base import Backbone
from fastgen.batch import Batch
from fastgen.denoiser import NO_INPUTS, Denoiser, Inputs
from fastgen.flow import flow_maps, time_pairs
from fastgen.flow.time_pairs import GridPairs, ScaleRange, ShrinkingPairs
from fastgen.networks import Networks, move
from fastgen.objectives.base import Guidance, Loss, Objective, State, Turn
from fastgen.objectives.ladd import Ladd
from fastgen.recipe import Recipe
from fastgen.rollout import RolloutPolicy, transition
from fastgen.schedule import expand


@plain_dataclass(frozen=True)
class ConsistencyTurn(Turn):
    """update: its number, for the curricula. phases: of this update."""

    update: int = 0
    phases: int = 1


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Consistency(Objective):
    takes_inputs = True

    name: Literal["consistency"] = "consistency"
    teach: Literal["teacher", "data"] = "teacher"
    grid: GridPairs | None = None
    shrinking: ShrinkingPairs | None = None
    solver: Literal["euler", "heun"] = "euler"  # LCM, PCM: one DDIM step; CM: Heun
    solver_steps: int = Field(default=1, ge=1)  # from t to s; CTM: up to 17, and several lessen the bias
    phases: tuple[int, ...] = Field(default=(1,), min_length=1)  # one after the other; Hyper-SD: 8, 4, 2, 1
    phase_updates: int = Field(default=0, ge=0)  # of each entry of phases but the last
    end: Literal["edge", "uniform"] = "edge"  # uniform: TSCD
    guidance_scale: Guidance = 1.0  # PCM's SD3: 4 (its w = 3 is this convention's w + 1)
    guidance_range: ScaleRange | None = None  # LCM's w ~ U[5, 15] in cond + w (cond - uncond) is [6, 16] here
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # as DMD2's
    # CD and LCM: 0.95; CT: mu_0 = 0.9, raised as the grid grows; None, as iCT, ECT, PCM: the current weights
    target_decay: float | None = Field(default=None, ge=0, lt=1)
    distance: Literal["huber", "square"] = "huber"
    huber: float = Field(default=5.4e-4, ge=0)  # "c = 0.00054 sqrt(d)", iCT; LCM's and PCM's 1e-3 is by element
    weight: Literal["one", "gap"] = "one"  # CM, LCM, PCM: 1; iCT, ECT: 1 / (t - s)
    gan: Ladd | None = None  # PCM: weight 0.1; D tells where x_t is sent from where x_s is, both renoised in the phase

    @model_validator(mode="after")
    def _possible(self) -> "Consistency":
        if (self.grid is None) == (self.shrinking is None):
            raise ValueError("pairs of levels come from grid (CM, iCT, LCM, PCM) or from shrinking (ECT); give one")
        asks = (self.solver, self.solver_steps, self.guidance_scale, self.guidance_range) != ("euler", 1, 1.0, None)
        if self.teach == "data" and asks:
            raise ValueError("teach: data asks no teacher: leave out solver, solver_steps and guidance")
        if min(self.phases) < 1 or (len(self.phases) > 1 and not self.phase_updates):
            raise ValueError(
                f"phases are numbers from 1 up, each but the last for phase_updates updates, got "
                f"{list(self.phases)} and {self.phase_updates}"
            )
        return self

    @property
    def trained_roles(self) -> tuple[str, ...]:
        return ("student", "discriminator") if self.gan else ("student",)

    @property
    def full_roles(self) -> tuple[str, ...]:
        return ("discriminator",) if self.target_decay is None else ("discriminator", "student")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"latents"})

    def check(self, policy: RolloutPolicy) -> None:
        if policy.two_time:
            raise ValueError(
                "a consistency model is not told where its step ends; remove rollout.two_time, or take "
                "objective flow_map"
            )
        time_pairs.check_told(policy, self.guidance_range)
        if policy.num_steps == 1 or self.end == "uniform":
            return
        count = self.phases[-1]
        if count == 1 and policy.transition != "renoise":
            raise ValueError(
                f"a consistency model of one phase only knows the way to 0: transition: "
                f"{policy.transition} needs end: uniform, or phases with ode; use renoise"
            )
        edges = time_pairs.shifted(
            torch.arange(count, 0, -1, dtype=torch.float64) / count, self.grid.shift if self.grid else 1.0
        ).tolist()
        held = len(edges) == policy.num_steps and max(abs(a - b) for a, b in zip(edges, policy.timesteps)) < 1e-3  # noqa: B905
        if count > 1 and (policy.transition != "ode" or not held):
            raise ValueError(
                f"{count} phases are sampled from edge to edge: set rollout.transition: ode, timesteps "
                f"{[round(t, 4) for t in edges]}, or end: uniform"
            )

    def check_recipe(self, recipe: Recipe) -> None:
        """Ratios t / (1 - t) and velocities are of flow matching; a uniform grid with Euler steps is of every path."""
        plain = self.grid is not None and self.grid.spacing == "uniform" and self.grid.time is None
        if not recipe.backbone.flow_matching and (not plain or self.solver == "heun"):
            raise ValueError(
                f"on backbone {recipe.backbone.name} the grid is uniform, as LCM's: leave out spacing, time, "
                "shrinking and solver"
            )

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        """A target network draws the student's dropout, and so stays in training mode."""
        modules = {} if self.gan is None else self.gan.networks(backbone)
        if self.target_decay is not None:
            modules["target"] = self.make_student(backbone, policy).requires_grad_(False)
        return modules

    def init_state(self) -> State:
        return {} if self.target_decay is None else {"updates": torch.zeros((), dtype=torch.int64)}

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        stage = min(step // self.phase_updates, len(self.phases) - 1) if self.phase_updates else len(self.phases) - 1
        roles = ("discriminator", "student") if self.gan else ("student",)
        return tuple(ConsistencyTurn(role, (role,), update=step, phases=self.phases[stage]) for role in roles)

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        assert isinstance(turn, ConsistencyTurn)
        if turn.name == "discriminator":
            assert self.gan is not None
            with torch.no_grad():
                here, there, (low, high), _ = self.ends(turn, networks, batch, state)
            return self.gan.discriminator_loss(networks, batch, here, there, low, high)
        here, there, (low, high), gap = self.ends(turn, networks, batch, state)
        error, weight = here - there, torch.ones_like(gap) if self.weight == "one" else 1 / gap
        if self.distance == "huber":
            total = flow_maps.pseudo_huber(error, self.huber, weight)
        else:
            total = (weight * signals.per_sample_mean(error.square())).mean()
        terms = {"error": signals.per_sample_mean(error.detach().square()).mean().sqrt(), "gap": gap.mean()}
        if self.gan is not None:
            gan = self.gan.student_loss(networks, batch, here, low, high)
            total, terms["gan"] = total + self.gan.weight * gan, gan.detach()
        return Loss(total, {"loss": total.detach()} | terms)

    def ends(
        self, turn: ConsistencyTurn, networks: Networks, batch: Batch, state: State
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
        """Where x_t is sent and, without gradient, where x_s is, [B, ...] each; the level they are sent to and the
        upper edge of its phase; and t - s, [B] each."""
        pairs = self.grid or self.shrinking
        assert batch.latents is not None and pairs is not None
        t, s = pairs(batch, turn.update)
        edge, upper = time_pairs.phase_edges(t, turn.phases, self.grid.shift if self.grid else 1.0)
        s = torch.maximum(s, edge)
        end = edge if self.end == "edge" else time_pairs.between(edge, s, batch.uniform("end"))
        noise, schedule = batch.normal("noise"), networks.student.schedule
        x_t = schedule.add_noise(batch.latents, noise, t).to(noise.dtype)
        inputs = NO_INPUTS
        if self.guidance_range is not None and networks.policy.embedded_guidance is not None:
            inputs = Inputs(guidance=time_pairs.drawn_scale(batch, self.guidance_range))
        with torch.no_grad(), torch.random.fork_rng([x_t.device] if x_t.is_cuda else []):  # the same dropout twice
            if self.teach == "data":
                x_s = schedule.add_noise(batch.latents, noise, s).to(noise.dtype)
            else:
                x_s = self.solver_step(networks, batch, x_t, t, s)
            below = self.step_to_end(
                self.target(networks, state), batch, x_s, s.clamp_min(flow_maps.SHORTEST), end, inputs
            )
            there = torch.where(expand(s > end, x_s), below, x_s)
        return self.step_to_end(networks.student, batch, x_t, t, end, inputs), there, (end, upper), t - s

    def finish(self, turn: Turn, networks: Networks, state: State) -> None:
        """target <- mu target + (1 - mu) student,   mu = target_decay^(s_0 / N(k)): CT's exp(s_0 ln mu_0 / N(k)), N
        being the number of levels; on a grid that does not grow it is target_decay."""
        if self.target_decay is None or turn.name != "student":
            return
        grown = 1.0
        if self.grid is not None:
            grown = (self.grid.count + 1) / (self.grid.intervals(int(state["updates"])) + 1)
        move(networks["target"], networks.student, self.target_decay**grown)
        state["updates"] += 1

    def target(self, networks: Networks, state: State) -> Denoiser:
        """The network below; a moving average starts where the student starts, also from `init_from`."""
        if self.target_decay is None:
            return networks.student
        if not int(state["updates"]):
            move(networks["target"], networks.student, 0.0)
        return networks["target"]  # type: ignore[return-value]

    def step_to_end(
        self, network: Denoiser, batch: Batch, x: Tensor, t: Tensor, end: Tensor, inputs: Inputs
    ) -> Tensor:
        """Where the network's clean prediction at x, t takes x: its ode step to `end`, [B, ...]."""
        x0 = network(x, t, batch.cond, inputs)
        return transition(network.schedule, x0, x, t, end, None)

    def solver_step(self, networks: Networks, batch: Batch, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """x_s by steps of the solver along the guided teacher."""
        teacher, scale = networks.teacher, None
        if self.guidance_range is not None:
            scale = time_pairs.drawn_scale(batch, self.guidance_range)
        for i in range(self.solver_steps):
            here, there = (t + (s - t) * k / self.solver_steps for k in (i, i + 1))
            if self.solver == "heun":
                own = self.guidance_scale if scale is None else scale
                velocity = flow_maps.guided_velocity(teacher, batch.cond, batch.uncond, own, self.guidance_interval)
                x = flow_maps.heun_step(velocity, x, here, there).to(x.dtype)
                continue
            at = teacher.per_expert(self.guidance_scale, here) if scale is None else scale
            x0 = signals.guided(teacher, x, here, batch.cond, batch.uncond, at, self.guidance_interval)
            x = transition(teacher.schedule, x0, x, here, there, None).to(x.dtype)
        return x
