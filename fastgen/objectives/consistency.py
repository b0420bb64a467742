"""Consistency distillation and training: the student sends every point of an ODE trajectory to the trajectory's end.

    paper               here                  what it is
    f_theta(x, t)       networks.student      its clean prediction; at t = 0 it is x itself, by the noise path alone
    f_theta^-           networks["target"]    a moving average of the student (target_decay), or the student itself
    t_{n+1}, t_n        t, s                  neighbouring levels: `grid` (CM, iCT, LCM), or `shrinking` (ECT)
    Phi(x, t_{n+1})     x_s                   one step of a solver along the guided teacher (distillation, CD)
    x + t_n z           x_s                   the same data and noise at level s (training, CT)
    omega               scale                 guidance scale, drawn for each sample; also an input of the student, with
                                              rollout.embedded_guidance
    s_m, t_b            phase_edges(t)        the lower edge of the phase that t is in (PCM, Hyper-SD)
    t_end               end                   the level that both points are sent to: 0, an edge, or any level between
                                              the edge and s

The algorithm, for every student update:
    t, s from the law of pairs of this update, s not below the edge of t's phase;  x_t from data and noise
    x_s = a step of the teacher from x_t (CD), or data and the same noise at s (CT)
    student <- w d(step of f(x_t, t) to end,  sg[step of f^-(x_s, s) to end]),   d: see Units
               (+ PCM's adversarial term; the discriminator has its own turn before the student's)
               (+ feedback: rewards of f(x_t, t), see `objectives.feedback`)
    the target network, if there is one, and the average of the student's weights are updated once.
A step of f to `end` is the ODE step with f's clean prediction. A step to 0 is that prediction.

Units, of a sample's error e with d elements. They decide what the weight of another term means, so a published
gan.weight goes with its paper's distance:
    huber              sqrt(|e|^2 + c^2 d) - c sqrt(d), |e| a sum over the elements (iCT; with c = 0, ECT)
    elementwise_huber  mean sqrt(e^2 + c^2) - c, a mean over the elements (LCM, PCM): sqrt(d) smaller for large errors
    square             mean e^2 (CM; LCM's other choice)
    weight gap         1 / (sigma_t - sigma_s) (iCT, ECT), with sigma = t / (1 - t). Their sigma is for data of
                       standard deviation 0.5, where ours is 1: it and the error are both twice theirs, so that the
                       quotient is the same number.

The settings that correspond to each paper:
    CM     arXiv 2303.01469  CD: grid {count: 39, spacing: karras}, solver edm_heun, target_decay 0.95, square
                             CT: teach data, grid {count: 1, last: 150, spacing: karras}, target_decay 0.9, square
    iCT    arXiv 2310.14189  teach data, grid {count: 10, last: 1280, growth: doubling, spacing: karras, time: ...},
                             weight gap
    ECT    arXiv 2406.14548  teach data, shrinking, weight gap, huber 0; it starts from a diffusion model, as every
                             run does here
    LCM    arXiv 2310.04378  grid {count: 50}, guidance_range [6, 16], rollout.embedded_guidance, target_decay 0.95,
                             elementwise_huber;
                             LCM-LoRA (2311.05556): lora.student, no target network, and no guidance input
    PCM    arXiv 2405.18407  grid {count: 100}, phases [4], rollout ode from edge to edge, elementwise_huber, gan
    TSCD   arXiv 2404.13686  phases [8, 4, 2, 1], end uniform, rollout tcd; then feedback (Hyper-SD's second stage)
    TCM    arXiv 2410.14895  ECT, then truncation: a second stage at high noise, see objectives/truncation.py

The optimum depends on the grid. With n intervals of Euler steps, or of data, the samples have too little variance: a
Gaussian of std 0.5 ends at 0.34 with n = 4, 0.456 with 16 and 0.494 with 128. The heun solver and growing grids reduce
this error. The network is not conditioned on `end`, so TSCD's jumps between edges are approximate; flow_map trains
students that have the end of the jump as an input.

A student that works chunk by chunk (`rollout.chunks`) learns from data alone. Every chunk of a video has levels t and
s of its own, and sees the clean frames before it. Both points lie on one ray and see the same past. The optimum is the
flow map of each chunk given its past: the causal consistency model that Self Forcing may start from (Causal Forcing,
arXiv 2602.02214). A bidirectional teacher has no ODE of a chunk given its past, so it cannot teach. Every frame counts
as a sample in the distance.

Departures. Paths end at exactly 0, so c_skip and c_out are not needed (LCM's are 0 and 1 except at the last levels).
Levels are the teacher's own. There is no LPIPS distance. CM's paper and its code disagree on N(k) in the decay of the
target network: levels in the paper, which is followed here, and intervals in the code.
"""

from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen import signals
from fastgen.backbones.base import Backbone
from fastgen.batch import Batch
from fastgen.denoiser import NO_INPUTS, Denoiser, Inputs
from fastgen.flow import flow_maps, time_pairs
from fastgen.flow.flow_maps import Distance
from fastgen.flow.time_pairs import GridPairs, ScaleRange, ShrinkingPairs
from fastgen.networks import Networks, move
from fastgen.objectives.base import Guidance, Loss, Objective, State, Turn
from fastgen.objectives.causal import Form, by_frame, check_order, predict_chunks
from fastgen.objectives.embedding import Embedding, check_batch
from fastgen.objectives.feedback import Feedback
from fastgen.objectives.ladd import Ladd
from fastgen.objectives.truncation import Truncation
from fastgen.recipe import Recipe
from fastgen.registry import MOST_STEPS, MOST_UPDATES
from fastgen.rollout import RolloutPolicy, transition
from fastgen.schedule import expand


@plain_dataclass(frozen=True)
class ConsistencyTurn(Turn):
    """update: the number of the update, on which the pairs of levels depend. phases: the number of phases in this
    update. truncated: whether this update trains high noise alone."""

    update: int = 0
    phases: int = 1
    truncated: bool = False


@plain_dataclass(frozen=True)
class Endpoints:
    """The two points that are compared, and the levels that belong to them.

    clean: [B, ...], the student's prediction at x_t. student: [B, ...], where its step takes x_t.
    target: [B, ...], where the target network's step takes x_s, without gradient.
    t: [B], the level of x_t. end: [B], that of both points. upper: [B], the upper edge of the phase. gap: [B], t - s.
    weight: [B], that of the pair in the loss. For the chunks of videos, levels and weights are [B, F]."""

    clean: Tensor
    student: Tensor
    target: Tensor
    t: Tensor
    end: Tensor
    upper: Tensor
    gap: Tensor
    weight: Tensor


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Consistency(Objective):
    examples = tuple(
        {"grid": {"count": 40}, **keys}
        for keys in ({}, {"gan": {"weight": 0.1}}, {"teach": "data"}, {"feedback": {"weight": 0.1}})
    )
    page = "docs/flow_maps.md"
    takes_inputs = True
    takes_chunks = True

    name: Literal["consistency"] = "consistency"
    teach: Literal["teacher", "data"] = "teacher"
    grid: GridPairs | None = None
    shrinking: ShrinkingPairs | None = None
    # LCM, PCM: one DDIM step, which is Euler's; CM: edm_heun, in sigma (row cm_distillation); heun: in t, ours
    solver: Literal["euler", "heun", "edm_heun"] = "euler"
    # from t to s; CTM: up to 17; several steps reduce the bias
    solver_steps: int = Field(default=1, ge=1, le=MOST_STEPS)
    # numbers of phases, used one after the other; Hyper-SD: 8, 4, 2, 1
    phases: tuple[Annotated[int, Field(ge=1, le=MOST_STEPS)], ...] = Field(default=(1,), min_length=1)
    phase_updates: int = Field(default=0, ge=0, le=MOST_UPDATES)  # updates with each entry of phases, except the last
    end: Literal["edge", "uniform"] = "edge"  # uniform: between the edge and s, TSCD
    guidance_scale: Guidance = 1.0  # PCM's SD3: 4 (its w = 3 is this convention's w + 1)
    guidance_range: ScaleRange | None = None  # LCM's w ~ U[5, 15] in cond + w (cond - uncond) is [6, 16] here
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # as in DMD2
    # CD on 40 levels, and LCM: 0.95; CT: mu_0 = 0.9, which rises as the grid grows; None: the current weights, as in
    # iCT, ECT, PCM. Rows cm_schedule, ict_schedule
    target_decay: float | None = Field(default=None, ge=0, lt=1)
    distance: Distance = "huber"
    # iCT's "c = 0.00054 sqrt(d)", of a sample's norm, for data of std 0.5, is twice that for latents of std 1. Row
    # ict_loss has the number, and nothing public this norm. With elementwise_huber, LCM's and PCM's c is 1e-3, for
    # latents of std 1 (rows lcm_loss, pcm_loss)
    huber: float = Field(default=1.08e-3, ge=0)
    weight: Literal["one", "gap", "level_gap"] = "one"  # CM, LCM, PCM: 1; gap: iCT, ECT; level_gap: 1 / (t - s), ours
    # PCM: weight 0.1 of a mean, with elementwise_huber (row pcm_ratio), generator hinge, and time from 0 to 1. D
    # distinguishes the two points that are compared, both renoised within the phase
    gan: Ladd | None = None
    embedding: Embedding | None = None  # of the student's points and real data noised to the same level
    truncation: Truncation | None = None  # TCM's second stage
    feedback: Feedback | None = None  # Hyper-SD's second stage: rewards of the student's clean predictions
    form: Form = "packed"  # with rollout.chunks, see `objectives.causal`

    @model_validator(mode="after")
    def _possible(self) -> "Consistency":
        if (self.grid is None) == (self.shrinking is None):
            raise ValueError(
                "pairs of levels come from grid (CM, iCT, LCM, PCM) or from shrinking (ECT); give exactly one of them"
            )
        teacher_settings = (self.solver, self.solver_steps, self.guidance_scale, self.guidance_range)
        if self.teach == "data" and teacher_settings != ("euler", 1, 1.0, None):
            raise ValueError(
                "teach: data does not call the teacher: leave out solver, solver_steps, guidance_scale and "
                "guidance_range"
            )
        if len(self.phases) > 1 and not self.phase_updates:
            raise ValueError(
                "phases: several entries need phase_updates, the number of updates with each except the last; got "
                f"{list(self.phases)} and phase_updates {self.phase_updates}"
            )
        if self.truncation and (self.shrinking is None or (self.phases, self.end) != ((1,), "edge")):
            raise ValueError(
                "truncation goes on where a consistency model of one phase ends, with levels s that belong to any t: "
                "give shrinking, and leave out phases and end"
            )
        return self

    @property
    def learned_levels(self) -> tuple[float, ...] | None:
        """With one phase, those of the grid are sent to 0, and all where levels are drawn without one."""
        if self.phases[-1] != 1 or self.end != "edge" or self.truncation:
            return ()
        return None if self.grid is None else tuple(self.grid.levels(self.grid.updates)[1:].tolist())

    @property
    def trained_roles(self) -> tuple[str, ...]:
        return ("student", "discriminator") if self.gan else ("student",)

    @property
    def full_roles(self) -> tuple[str, ...]:
        copied = self.target_decay is not None or self.truncation is not None
        return ("discriminator", "student") if copied else ("discriminator",)

    @property
    def rewards_required(self) -> bool:  # type: ignore[override]
        return self.feedback is not None

    @property
    def reward_use(self) -> Literal["none", "score", "gradient"]:  # type: ignore[override]
        return "gradient" if self.feedback else "none"

    @property
    def unmasked(self) -> str | None:
        return "form: chunks" if self.form == "packed" else None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"latents"})

    @property
    def takes_first_timesteps(self) -> bool:
        return True

    @property
    def grid_shift(self) -> float:
        """The shift of the grid, which also moves the edges of the phases."""
        return self.grid.shift if self.grid else 1.0

    def check(self, policy: RolloutPolicy) -> None:
        if policy.two_time:
            raise ValueError(
                "a consistency model is not conditioned on the level where its step ends; remove rollout.two_time, "
                "or use objective flow_map"
            )
        time_pairs.check_told(policy, self.guidance_range)
        check_order(policy)
        if policy.chunks is not None and (
            (self.teach, self.phases, self.end) != ("data", (1,), "edge")
            or self.gan
            or self.embedding
            or self.truncation
            or self.feedback
        ):
            raise ValueError(
                "with rollout.chunks, consistency learns the whole way to clean frames, from data: set teach: data, "
                "and leave out phases, end, truncation, feedback, gan and embedding (chunks that are predicted from "
                "real frames do not continue each other, and what looks at whole videos would see that)"
            )
        if policy.chunks is None and self.form != "packed":
            raise ValueError("form says how the chunks of a video are predicted, and there are none: leave it out")
        if self.truncation:
            self.truncation.check(policy)
        if policy.num_steps == 1 or self.end == "uniform":
            return
        count = self.phases[-1]
        if count == 1 and policy.transition != "renoise":
            raise ValueError(
                f"a consistency model of one phase only learns steps to 0, and transition: {policy.transition} steps "
                "to other levels; use renoise, several phases with ode, or end: uniform"
            )
        if count == 1:
            return
        uniform_edges = torch.arange(count, 0, -1, dtype=torch.float64) / count
        edges = time_pairs.shifted(uniform_edges, self.grid_shift).tolist()
        steps_at_edges = len(edges) == policy.num_steps and all(
            abs(edge - t) < 1e-3 for edge, t in zip(edges, policy.timesteps, strict=True)
        )
        if policy.transition != "ode" or not steps_at_edges:
            raise ValueError(
                f"{count} phases are sampled from edge to edge: set rollout.transition: ode and rollout.timesteps: "
                f"{[round(t, 4) for t in edges]}, or set end: uniform"
            )

    def check_recipe(self, recipe: Recipe) -> None:
        """Noise-to-signal ratios t / (1 - t) and velocities need flow matching. A uniform grid with Euler steps works
        on every noise path."""
        check_batch(self.embedding, recipe)
        if self.gan:
            self.gan.check_batch(recipe)
        if self.truncation:
            self.truncation.check_recipe(recipe)
        features = self.gan or (self.embedding is not None and self.embedding.features == "teacher")
        if features and (self.phases, self.end) != ((1,), "edge") and recipe.backbone.own_boundaries():
            raise ValueError(
                "gan, and embedding with features: teacher, read the features of one expert of the pipeline, and with "
                "phases or end: uniform the samples of an update may need several: leave out phases and end, or these "
                "terms"
            )
        uniform = self.grid is not None and self.grid.spacing == "uniform" and self.grid.time is None
        if not recipe.backbone.flow_matching and (not uniform or self.solver != "euler" or self.weight == "gap"):
            raise ValueError(
                f"on backbone {recipe.backbone.name} the grid is uniform, as in LCM: leave out spacing, time, "
                "shrinking, solver and weight: gap"
            )

    def auxiliary(self, backbone: Backbone, policy: RolloutPolicy) -> dict[str, nn.Module]:
        """The discriminator, the target network and the first stage, where they are used. The last two draw the same
        dropout as the student, so they stay in training mode."""
        modules = {} if self.gan is None else self.gan.networks(backbone)
        modules |= {} if self.embedding is None else self.embedding.networks_needed(backbone)
        if self.target_decay is not None:
            modules["target"] = self.make_student(backbone, policy).requires_grad_(False)
        if self.truncation is not None:
            modules["first"] = self.make_student(backbone, policy).requires_grad_(False)
        return modules

    def init_state(self) -> State:
        state = {} if self.target_decay is None else {"updates": torch.zeros((), dtype=torch.int64)}
        return state | ({} if self.truncation is None else {"stored": torch.zeros((), dtype=torch.int64)})

    def turns(self, step: int, state: State) -> tuple[Turn, ...]:
        stage = len(self.phases) - 1
        if self.phase_updates:
            stage = min(step // self.phase_updates, stage)
        roles = ("discriminator", "student") if self.gan else ("student",)
        truncated = self.truncation is not None and step >= self.truncation.begin
        return tuple(
            ConsistencyTurn(role, (role,), update=step, phases=self.phases[stage], truncated=truncated)
            for role in roles
        )

    def loss(self, turn: Turn, networks: Networks, batch: Batch, state: State) -> Loss:
        assert isinstance(turn, ConsistencyTurn)
        if turn.name == "discriminator":
            assert self.gan is not None
            with torch.no_grad():
                points = self.endpoints(turn, networks, batch, state)
            return self.gan.discriminator_loss(
                networks, batch, points.student, points.target, points.end, points.upper
            )
        points = self.endpoints(turn, networks, batch, state)
        error, weight = points.student - points.target, points.weight
        if weight.dim() == 2:
            error, weight = error.flatten(0, 1), weight.flatten()
        total = flow_maps.weighted_distance(error, self.distance, self.huber, weight)
        terms = {"error": signals.per_sample_mean(error.detach().square()).mean().sqrt(), "gap": points.gap.mean()}
        if turn.truncated and self.truncation is not None:
            at_boundary = self.truncation.boundary(batch)
            square = signals.per_sample_mean(error.detach().square())
            terms["boundary"] = ((square * at_boundary).sum() / at_boundary.sum().clamp_min(1)).sqrt()
        if self.gan is not None:
            gan = self.gan.student_loss(networks, batch, points.student, points.end, points.upper)
            total = total + self.gan.weight * gan
            terms["gan"] = gan.detach()
        if self.embedding is not None:
            assert batch.latents is not None
            distance = self.embedding.student_loss(networks, batch, points.student, batch.latents, points.end)
            total = total + self.embedding.weight * distance
            terms["embedding"] = distance.detach()
        if self.feedback is not None:
            missed, logged = self.feedback.loss(networks, batch, points.clean, points.t)
            total = total + self.feedback.weight * missed
            terms |= logged
        return Loss(total, {"loss": total.detach()} | terms)

    def endpoints(self, turn: ConsistencyTurn, networks: Networks, batch: Batch, state: State) -> Endpoints:
        """The two points that an update compares. Gradient flows to the student through `Endpoints.student` alone."""
        assert batch.latents is not None
        t, s = self.levels(batch, networks.policy, turn.update)
        truncation = self.truncation if turn.truncated else None
        if truncation is not None:
            assert self.shrinking is not None
            t, s = truncation.levels(batch, self.shrinking, turn.update)
        edge, upper = time_pairs.phase_edges(t, turn.phases, self.grid_shift)
        s = torch.maximum(s, edge)
        end = edge if self.end == "edge" else time_pairs.between(edge, s, batch.uniform("end"))
        noise = batch.normal("noise")
        schedule = networks.student.schedule
        x_t = schedule.add_noise(batch.latents, noise, t).to(noise.dtype)
        inputs = NO_INPUTS
        if self.guidance_range is not None and networks.policy.embedded_guidance is not None:
            inputs = Inputs(guidance=time_pairs.drawn_scale(batch, self.guidance_range))
        devices = [x_t.device] if x_t.is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(devices):  # the same dropout twice
            if self.teach == "data":
                x_s = schedule.add_noise(batch.latents, noise, s).to(noise.dtype)
            else:
                x_s = self.solver_step(networks, batch, x_t, t, s)
            start = s.clamp_min(flow_maps.SHORTEST)
            target = self.target(networks, state)
            from_s = self.step_to_end(target, networks.policy, batch, x_s, start, end, inputs)
        weight = self.pair_weight(t, s, turn.update)
        if truncation is not None:
            first = self.first_stage(networks, state)
            with torch.no_grad(), torch.random.fork_rng(devices):
                before = self.step_to_end(first, networks.policy, batch, x_s, start, end, inputs)
            from_s, weight = truncation.target(s, before, from_s), weight * truncation.weights(batch)
        from_s = torch.where(expand(s > end, x_s), from_s, x_s)  # at s = end no step is left
        clean = self.predict(networks.student, networks.policy, batch, x_t, t, inputs)
        from_t = transition(schedule, clean, x_t, t, end, None)
        return Endpoints(clean, from_t, from_s, t, end, upper, t - s, weight)

    def pair_weight(self, t: Tensor, s: Tensor, update: int) -> Tensor:
        """w of the pairs, in the shape of t."""
        if self.weight == "one":
            return torch.ones_like(t)
        if self.weight == "level_gap":
            return 1 / (t - s)
        return 1 / time_pairs.ratio_gap(t, s, self.pairs.end_ratios(update))

    @property
    def pairs(self) -> GridPairs | ShrinkingPairs:
        """The law of t and s."""
        pairs = self.grid or self.shrinking
        assert pairs is not None
        return pairs

    def levels(self, batch: Batch, policy: RolloutPolicy, update: int) -> tuple[Tensor, Tensor]:
        """t and s of this update, [B], or for the chunks of videos [B, F]."""
        pairs = self.pairs
        if policy.chunks is None:
            return pairs(batch, update)
        chunks, num_frames = policy.chunks, batch.latent_shape[0]
        t, s = pairs(batch, update, shape=(len(chunks.split(num_frames)),))
        return by_frame(t, chunks, num_frames), by_frame(s, chunks, num_frames)

    def finish(self, turn: Turn, networks: Networks, state: State) -> None:
        """target <- mu target + (1 - mu) student"""
        if self.target_decay is None or turn.name != "student":
            return
        move(networks["target"], networks.student, self.decay(int(state["updates"])))
        state["updates"] += 1

    def decay(self, update: int) -> float:
        """mu = target_decay^(s_0 / N(k)) at update k, which is CT's exp(s_0 ln mu_0 / N(k)). N(k) is the number of
        levels, and s_0 that at the start. On a grid that does not grow, mu is target_decay."""
        assert self.target_decay is not None
        if self.grid is None:
            return self.target_decay
        return self.target_decay ** ((self.grid.count + 1) / (self.grid.intervals(update) + 1))

    def target(self, networks: Networks, state: State) -> Denoiser:
        """The network that is applied to x_s. A moving average starts from the student's first weights, also those
        that `init_from` loads."""
        if self.target_decay is None:
            return networks.student
        if not int(state["updates"]):
            move(networks["target"], networks.student, 0.0)
        return networks["target"]  # type: ignore[return-value]

    def first_stage(self, networks: Networks, state: State) -> Denoiser:
        """The student as truncated training began, whose weights are stored then."""
        if not int(state["stored"]):
            move(networks["first"], networks.student, 0.0)
            state["stored"].fill_(1)
        return networks["first"]  # type: ignore[return-value]

    def step_to_end(
        self,
        network: Denoiser,
        policy: RolloutPolicy,
        batch: Batch,
        x: Tensor,
        t: Tensor,
        end: Tensor,
        inputs: Inputs,
    ) -> Tensor:
        """The ODE step from (x, t) to `end` with the network's clean prediction, [B, ...]."""
        x0 = self.predict(network, policy, batch, x, t, inputs)
        return transition(network.schedule, x0, x, t, end, None)

    def predict(
        self, network: Denoiser, policy: RolloutPolicy, batch: Batch, x: Tensor, t: Tensor, inputs: Inputs
    ) -> Tensor:
        if policy.chunks is None:
            return network(x, t, batch.cond, inputs)
        assert batch.latents is not None
        return predict_chunks(network, policy, batch, batch.latents, x, t, batch.cond, self.form)

    def solver_step(self, networks: Networks, batch: Batch, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """x_s from x at level t, by `solver_steps` steps of the solver along the guided teacher."""
        teacher = networks.teacher
        drawn = None if self.guidance_range is None else time_pairs.drawn_scale(batch, self.guidance_range)
        for i in range(self.solver_steps):
            start = t + (s - t) * i / self.solver_steps
            end = t + (s - t) * (i + 1) / self.solver_steps
            if self.solver != "euler":
                scale = self.guidance_scale if drawn is None else drawn
                velocity = flow_maps.guided_velocity(teacher, batch.cond, batch.uncond, scale, self.guidance_interval)
                step = flow_maps.heun_step if self.solver == "heun" else flow_maps.edm_heun_step
                x = step(velocity, x, start, end).to(x.dtype)
            else:
                expert_scale = teacher.per_expert(self.guidance_scale, start) if drawn is None else drawn
                x0 = signals.guided(teacher, x, start, batch.cond, batch.uncond, expert_scale, self.guidance_interval)
                x = transition(teacher.schedule, x0, x, start, end, None).to(x.dtype)
        return x
