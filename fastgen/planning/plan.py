"""What a recipe needs, found before anything is loaded: `fastgen plan recipe.yaml`.

The recipe's own objects are made without weights (`weightless`). Every turn of the objective runs once on them, with
loss and backward pass, while the bytes of live tensors are counted. So any objective is planned exactly as it is
written.

    held      parameters and buffers of the roles and of the moving average; AdamW's two moments of all trained
              parameters; text encoders and VAE, which load when first needed and then stay (with prepared prompts, the
              encoders are not loaded)
    encoding  the text encoders, if backbone.encoders is offload, and the gradients that earlier micro-batches left;
              with train.prefetch, the encoders may also be there during a turn
    turn      activations, including the bfloat16 weights that autocast keeps for the backward pass, and the gradients
              that the backward pass has accumulated so far; with train.accumulate > 1, all gradients from the start,
              as in every micro-batch after the first
    step      all gradients of a turn's roles, and AdamW's temporary memory: on a GPU as much as the second moments of
              one role (`foreach`), on a CPU as much as the largest parameter, none where it is fused
    samples   the guided teacher on the pictures that are sampled at once, or decoding them; for a student that works
              chunk by chunk (`rollout.chunks`), also its own sampling, as its context grows with the video

`fsdp` shards roles, average, moments and gradients over the GPUs, but not activations, encoders and VAE. In addition
to its shards, a GPU then holds the layers outside the blocks, two gathered blocks and the gradients of one block, in
the dtype of mixed precision (derived, not measured). With `train.accumulate` above 1 it also holds the whole gradients
of a turn's roles, unless `train.reduce_gradients` is micro_batch.

A recipe fits if its peak fits into what is left of a GPU's memory: without `CONTEXT` for the CUDA context and the
workspaces of libraries, and without a share for fragmentation (`--headroom`).

Compiled blocks (`train.compile`) are counted as the eager ones. Not counted are the bfloat16 copy of the one layer of
a teacher in float8 that runs, the memory that kernels use internally, the networks of rewards and metrics, what
encoding prompts needs, and prompt embeddings kept for later (at most a gigabyte). Where the encoders are large,
prompts are taken to be of the greatest length.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastgen import noise
from fastgen.backbones.base import Backbone
from fastgen.backbones.pipeline import PipelineBackbone
from fastgen.batch import Batch, Conditioning
from fastgen.denoiser import Denoiser, Inputs
from fastgen.modules.segment_flow import Line
from fastgen.networks import Networks
from fastgen.objectives import Loss, State, Turn
from fastgen.planning.components import Component, components_of
from fastgen.planning.roles import Role, average_of, keep_float32, role_of
from fastgen.planning.weightless import LiveBytes, empty, weightless
from fastgen.recipe import Recipe
from fastgen.registry import RecipeError
from fastgen.rewards import Score, Scorer
from fastgen.rollout import backward_simulation
from fastgen.run.build import build_backbone, build_networks, start_checkpointing
from fastgen.signals import guided, per_sample_mean

CONTEXT = 1_000_000_000  # bytes; ours, about what a CUDA context with cuBLAS, cuDNN and NCCL takes
DRAWS = 32  # network evaluations are counted over this many updates
SMALL_ENCODERS = 64 << 20  # bytes; text encoders of a local folder up to this size are run, to get the true length


@dataclasses.dataclass(frozen=True)
class TurnPlan:
    """One turn: its live bytes as counted, its network evaluations per sample, by role, and the floating-point
    operations of a micro-batch. The last two are means over draws."""

    turn: Turn
    live: LiveBytes
    evaluations: Mapping[str, float]
    operations: float = 0.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """All numbers of a recipe in bytes, for a given number of GPUs."""

    recipe: Recipe
    gpus: int
    gpu: bool  # whether AdamW is planned as on a GPU
    roles: tuple[Role, ...]
    components: tuple[Component, ...]
    turns: tuple[TurnPlan, ...]
    teacher_bytes: int  # activations of the guided teacher on a grid of samples
    decode_bytes: int
    student_bytes: int = 0  # of the student's sampling on a grid of samples, with what it remembers of its chunks

    @property
    def divided(self) -> bool:
        return self.recipe.train.strategy == "fsdp"

    @property
    def ways(self) -> int:
        """How many GPUs share one copy of the networks."""
        return (self.recipe.train.shard_group or self.gpus) if self.divided else 1

    @property
    def held(self) -> int:
        """Bytes that one GPU holds all the time."""
        networks = sum(-(-(r.held + r.moments) // self.ways) for r in self.roles)
        return networks + sum(c.held for c in self.components)

    @property
    def gathered(self) -> int:
        return max(r.outside + 3 * r.block for r in self.roles) if self.ways > 1 else 0

    @property
    def moments(self) -> dict[str, int]:
        """The most bytes on one GPU during each part of a run: turns, optimizer steps and sampling."""
        train, result = self.recipe.train, dict[str, int]()
        encoders = sum(c.turn for c in self.components)
        beside = encoders if train.prefetch else 0  # the next prompts are encoded during a turn
        kept_whole = train.accumulate > 1 and train.reduce_gradients == "update"
        for part in self.turns:
            trained = [r for r in self.roles if r.name in part.turn.roles]
            temporary = max(r.temporary for r in trained)
            live = part.live.peak(1 if kept_whole else self.ways)
            result[f"turn {part.turn.name}"] = self.held + self.gathered + live + beside
            step = sum(r.gradients for r in trained) + temporary
            result[f"step of {part.turn.name}"] = self.held + -(-step // self.ways) + beside
        if encoders:
            gradients = max(sum(r.gradients for r in self.roles if r.name in p.turn.roles) for p in self.turns)
            shared = gradients if kept_whole else -(-gradients // self.ways)
            result["encoding prompts"] = self.held + encoders + shared
        result["samples, teacher"] = self.held + self.gathered + self.teacher_bytes
        visiting = sum(r.visiting for r in self.roles)
        if self.student_bytes or visiting:
            result["samples, student"] = self.held + visiting + self.gathered + self.student_bytes
        result["samples, decoding"] = self.held + visiting + self.decode_bytes
        return result

    @property
    def peak(self) -> int:
        """The most bytes on one GPU at any moment."""
        return max(self.moments.values())


def plan(recipe: Recipe, gpus: int = 1, gpu: bool | None = None, activations: bool = True) -> Plan:
    """Plans a recipe. gpus: how many GPUs share the run. gpu: False plans AdamW and autocast as they run on a CPU; by
    default train.device decides, where `auto` counts as a GPU. activations: False leaves activations out, which gives
    a lower bound quickly.

    Raises RecipeError if the sizes cannot be known offline."""
    gpu = recipe.train.device != "cpu" if gpu is None else gpu
    try:
        config = recipe.backbone.unloaded()
    except ValueError as error:
        raise RecipeError(f"backbone: {error}") from None
    cpu = torch.device("cpu")
    built = build_networks(recipe, build_backbone(recipe, cpu, deferred=True, section=config), sizes=True)
    backbone, modules = built.backbone, built.modules
    for module in built.wholes:
        if recipe.train.strategy != "fsdp":
            keep_float32(module)
        weightless(module)
    if backbone.shared is not None:
        backbone.shared.refresh()
    start_checkpointing(recipe, built)  # adapters need no values
    scorer = StandInScorer(recipe.rewards, backbone.decode) if recipe.rewards else None
    networks = Networks(modules, recipe.rollout, scorer)
    roles = [role_of(name, module, recipe, backbone, gpu) for name, module in networks.items()]
    roles.append(average_of(built.average, recipe, backbone, gpu))
    components = components_of(recipe, backbone)
    if not activations:
        quick = tuple(TurnPlan(turn, LiveBytes(), {}) for turn in first_turns(recipe))
        return Plan(recipe, gpus, gpu, tuple(roles), components, quick, 0, 0)
    prompt = prompt_rows(recipe, backbone, components)
    teacher, decode = plan_samples(recipe, backbone, networks, prompt)
    student = plan_stream(recipe, backbone, networks, prompt) if recipe.rollout.chunks is not None else 0
    if gpu and recipe.train.mixed_precision == "bf16":
        for module in built.wholes:
            norms_in_float32(module)
    turns = tuple(plan_turn(turn, recipe, backbone, networks, prompt) for turn in first_turns(recipe))
    return Plan(recipe, gpus, gpu, tuple(roles), components, turns, teacher, decode, student)


def first_turns(recipe: Recipe) -> tuple[Turn, ...]:
    """The turns of the first update, and any other turns of the last one, because a run may have phases."""
    objective = recipe.objective
    turns = [t for step in (0, recipe.train.steps - 1) for t in objective.turns(step, objective.init_state())]
    return tuple({turn.name: turn for turn in reversed(turns)}.values())[::-1]


# --- text encoders, VAE, prompts


def prompt_rows(recipe: Recipe, backbone: Backbone, components: Sequence[Component]) -> Callable[[int], Conditioning]:
    """A function that gives the conditioning of any number of prompts. For a pipeline it is weightless, and of the
    greatest length, or of the length of the recipe's own prompts if the encoders are local and small."""
    encoders = sum(c.held + c.turn for c in components if c.is_encoder)
    if not isinstance(backbone, PipelineBackbone):
        one = backbone.encode_prompts([""])
        return lambda count: Conditioning({k: v.expand(count, *v.shape[1:]) for k, v in one.items()})
    shapes = backbone.prompt_shapes()
    if recipe.backbone.local_folder() is not None and 0 < encoders <= SMALL_ENCODERS:
        stream = recipe.data.open(backbone, recipe.seed)
        prompts = stream.prompts(torch.arange(2 * recipe.train.batch_size))
        shapes = {
            k: tuple(v.shape[1:]) for k, v in backbone.encode_prompts([*prompts, backbone.negative_prompt]).items()
        }
    shapes |= backbone.image_shapes()
    return lambda count: Conditioning({k: empty(count, *s, dtype=backbone.dtype) for k, s in shapes.items()})


@dataclasses.dataclass(frozen=True)
class WeightlessBatch(Batch):
    """A batch whose noise has no values. Ids, levels and choices are real, because they decide the graph."""

    def normal(self, name: str, by_group: bool = False, rows: Tensor | None = None) -> Tensor:
        count = len(self._rows(by_group) if rows is None else rows)
        return noise.normal(empty(count, dtype=torch.int64), self.latent_shape, 0, self.dtype)


@dataclasses.dataclass(frozen=True)
class CountingBatch(WeightlessBatch):
    """A batch that only serves to count network evaluations: its noise is not even drawn."""

    def normal(self, name: str, by_group: bool = False, rows: Tensor | None = None) -> Tensor:
        return empty(len(self._rows(by_group) if rows is None else rows), *self.latent_shape, dtype=self.dtype)


class StandInScorer(Scorer):
    """Decodes what the rewards read but makes up the scores, because the rewards' own networks are not counted. With
    gradient, the score is a mean over what was decoded. Without gradient, it has real values, because advantages
    decide what enters a loss."""

    def __call__(self, x0: Tensor, prompts: Sequence[str], group: Tensor | None, grad: bool) -> Score:
        used, made_up = self.composite.used(grad), torch.linspace(0, 1, len(x0))
        inputs = self.seen(x0, used.values(), grad)
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
            seen = torch.stack(
                [per_sample_mean(inputs[kind]).float() for kind in {p.input for p in used.values()}]
            ).sum(0)
        value = seen if grad else made_up
        return Score(value, torch.ones(len(x0), dtype=torch.bool), dict.fromkeys(used, made_up))

    def gradients(self, x0: Tensor, prompts: Sequence[str]) -> tuple[dict[str, Score], dict[str, Tensor]]:
        parts = self.composite.used(grad=False)
        inputs = self.seen(x0, parts.values(), grad=False)
        score = Score(torch.linspace(0, 1, len(x0)), torch.ones(len(x0), dtype=torch.bool))
        reads = {name: inputs[part.input] for name, part in self.composite.used(grad=True).items()}
        return dict.fromkeys(parts, score), {name: torch.empty_like(read) for name, read in reads.items()}


def make_batch(
    recipe: Recipe,
    backbone: Backbone,
    prompt: Callable[[int], Conditioning],
    key: int,
    kind: type[WeightlessBatch] = WeightlessBatch,
    count: int | None = None,
) -> Batch:
    """count: its samples; None: as many as the recipe's."""
    count, needs = count or recipe.train.batch_size, recipe.objective.needs
    ids = torch.arange(count)

    def data(*shape: int) -> Tensor:
        return empty(count, *shape, dtype=backbone.dtype)

    size, shape = largest(recipe, backbone)
    latents = data(*shape)
    return kind(
        ids=ids,
        key=key,
        cond=prompt(count),
        uncond=prompt(count),
        latent_shape=shape,
        prompts=("",) * count,
        latents=latents if "latents" in needs else None,
        pixels=data(3, *size) if "pixels" in needs and size else None,
        pairs=(latents, data(*shape)) if "pairs" in needs else None,
        group=ids // recipe.objective.group_size,
        dtype=backbone.dtype,
    )


def largest(recipe: Recipe, backbone: Backbone) -> tuple[tuple[int, int] | None, tuple[int, ...]]:
    """The size of the pictures that need most memory, (H, W), and the shape of their latents."""
    if not recipe.data.sizes:
        side = backbone.image_size
        return (side, side) if side else None, backbone.latent_shape
    size = max(recipe.data.sizes, key=math.prod)
    return size, backbone.latent_shape_of(size)


# --- one turn


def norms_in_float32(network: nn.Module) -> None:
    """Makes norms compute in float32, as autocast does on a GPU. On a CPU, autocast leaves them in bfloat16."""
    for module in network.modules():
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def plan_turn(
    turn: Turn, recipe: Recipe, backbone: Backbone, networks: Networks, prompt: Callable[[int], Conditioning]
) -> TurnPlan:
    """Counts network evaluations over a few draws, then the live bytes for the draw with the most evaluations."""
    state = recipe.objective.init_state()
    counted = {key: evaluations(turn, recipe, backbone, networks, prompt, state, key) for key in range(DRAWS)}
    rows = {role: sum(c[role] for c in counted.values()) / DRAWS for role in networks}
    key = max(counted, key=lambda k: sum(counted[k].values()))
    parameters = [p for role in turn.roles for p in networks[role].parameters()]
    with LiveBytes() as live:
        hooks = live.own_gradients(parameters)
        if recipe.train.accumulate > 1:
            for p in parameters:
                p.grad = torch.empty_like(p)
                live.own_gradient(p)
        batch = make_batch(recipe, backbone, prompt, noise.make_key(recipe.seed, turn.name, key))
        with recipe.train.autocast("cpu"):
            collections = [dict[str, object]() for _ in range(recipe.train.accumulate if turn.collects else 0)]
            for shared in collections:
                batch = dataclasses.replace(batch, shared=shared)
                recipe.objective.collect(turn, networks, batch, dict(state))
            for loss in losses(recipe, turn, networks, batch, state):
                (loss.total / recipe.train.accumulate).backward()
    for remove in hooks:
        remove()
    for p in parameters:
        p.grad = None
    share = sum(rows.values()) / max(1.0, sum(counted[key].values()))  # of the evaluations that were run
    evaluated = {role: n / recipe.train.batch_size for role, n in rows.items() if n}
    return TurnPlan(turn, live, evaluated, live.flops * share)


def losses(recipe: Recipe, turn: Turn, networks: Networks, batch: Batch, state: State) -> Iterator[Loss]:
    found = recipe.objective.loss(turn, networks, batch, state)
    return iter([found]) if isinstance(found, Loss) else found


class Counted(Denoiser):
    """Stands in for a denoiser: counts the rows that it is called with and returns its input."""

    def __init__(self, denoiser: Denoiser):
        nn.Module.__init__(self)
        self.__dict__["denoiser"] = denoiser  # not a submodule
        self.denoiser: Denoiser
        self.schedule, self.prediction_type = denoiser.schedule, denoiser.prediction_type
        self.feature_dim = getattr(denoiser, "feature_dim", 0)
        self.takes_chunks = denoiser.takes_chunks
        self.rows = 0
        self._features: list[list[Tensor]] = []

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        self.rows += len(x_t)
        if inputs.memory is not None:
            token = x_t.new_zeros(*x_t.shape[:2], 1, 1)  # one per frame
            inputs.memory.append((token, token))
        if inputs.segment is not None:
            inputs.segment.append(Line(t, torch.zeros_like(t), torch.stack([x_t, x_t], dim=1)))
        tokens = x_t.shape[1] if x_t.dim() == 5 else 1  # one per frame
        for features in self._features:
            features += [x_t.new_zeros(len(x_t), tokens, self.feature_dim) for _ in self.denoiser.feature_modules]
        return x_t

    @contextmanager
    def capture(self) -> Iterator[list[Tensor]]:
        features: list[Tensor] = []
        self._features.append(features)
        try:
            yield features
        finally:
            self._features.remove(features)

    def per_expert(self, value: float | Sequence[float], t: Tensor) -> float | Tensor:
        return self.denoiser.per_expert(value, t)

    @property
    def boundaries(self) -> tuple[float, ...]:
        return self.denoiser.boundaries

    @property
    def is_sharded(self) -> bool:
        return False


def evaluations(
    turn: Turn,
    recipe: Recipe,
    backbone: Backbone,
    networks: Networks,
    prompt: Callable[[int], Conditioning],
    state: State,
    key: int,
) -> dict[str, float]:
    """The number of rows that each network is called with in one micro-batch of a turn, the mean over inner updates if
    they share a rollout."""
    stand_ins = {role: Counted(m) if isinstance(m, Denoiser) else m for role, m in networks.items()}
    batch = make_batch(recipe, backbone, prompt, noise.make_key(recipe.seed, turn.name, key), CountingBatch)
    repeats = turn.updates if turn.one_rollout else 1
    batch = dataclasses.replace(batch, shared={} if turn.one_rollout else None)
    with torch.no_grad():
        for _ in range(repeats):
            for _ in losses(recipe, turn, Networks(stand_ins, networks.policy, networks.scorer), batch, state):
                pass
    return {role: m.rows / repeats if isinstance(m, Counted) else 0 for role, m in stand_ins.items()}


@torch.no_grad()
def plan_samples(
    recipe: Recipe, backbone: Backbone, networks: Networks, prompt: Callable[[int], Conditioning]
) -> tuple[int, int]:
    """Bytes of the activations of the guided teacher on the pictures of `samples/`, and of decoding them."""
    if not isinstance(backbone, PipelineBackbone):
        return 0, 0
    count, teacher = recipe.train.num_samples, networks.teacher
    with LiveBytes() as sampling:
        x, t = empty(count, *backbone.latent_shape, dtype=backbone.dtype), torch.full((count,), 0.5)
        guided(teacher, x, t, prompt(count), prompt(count), max_guidance(recipe, teacher, t))
    with LiveBytes() as decoding:
        backbone.decode(x).float()
    return sampling.peak(), decoding.peak()


@torch.no_grad()
def plan_stream(recipe: Recipe, backbone: Backbone, networks: Networks, prompt: Callable[[int], Conditioning]) -> int:
    """Bytes of a grid of samples that the student makes chunk by chunk, with all its steps."""
    batch = make_batch(recipe, backbone, prompt, 0, count=recipe.train.num_samples)
    with LiveBytes() as sampling:
        stop = torch.full_like(batch.ids, networks.policy.num_steps - 1)
        backward_simulation(networks.student, networks.policy, batch, stop, grad=False)
    return sampling.peak()


def max_guidance(recipe: Recipe, teacher: Denoiser, t: Tensor) -> float | Tensor:
    return teacher.per_expert(recipe.teacher_guidance, t)
