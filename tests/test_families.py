"""Every family of pipelines: the stock pipeline's own pixels, roles and adapters, and exports."""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FluxPipeline, SanaPipeline
from diffusers.schedulers import scheduling_flow_match_euler_discrete, scheduling_lcm, scheduling_scm
from role_turns import check_turns
from tiny_families import FAMILIES, LENGTH, PROMPTS, SEEDS, SIDE, Family, draws
from torch import Tensor, nn
from variants import slow

from fastgen import noise
from fastgen.backbones.base import RoleOptions
from fastgen.backbones.flow_image import from_tokens, to_tokens
from fastgen.backbones.pipeline_config import family_configs
from fastgen.batch import Batch
from fastgen.config import load_recipe
from fastgen.denoiser import Inputs
from fastgen.modules.lora import LoraConfig
from fastgen.modules.sharding import WeightsError
from fastgen.networks import Networks
from fastgen.objectives import DMD2
from fastgen.pipelines import few_step, flow_map
from fastgen.registry import PIPELINES, RecipeError
from fastgen.rollout import RolloutPolicy
from fastgen.sampling.adapters import Adapter, with_adapters
from fastgen.sampling.sampler import Sampler, teacher_sampler

STORED = [
    pytest.param(name, times, options, id=f"{name}-{i}", marks=pytest.mark.slow if i else ())
    for name, family in FAMILIES.items()
    for i, (times, options) in enumerate(family.lists)
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def folder(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family.folder(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def backbone(family: Family, folder: Path) -> Any:
    """Its text encoders load once, and what they encoded is kept."""
    return family.make(folder)


@pytest.fixture(scope="module")
def pipeline(backbone: Any) -> Any:
    """The same, for tests that make backbones of their own."""
    return backbone


def test_tokens_are_those_of_diffusers() -> None:
    latents = torch.randn(2, 4, 6, 8)
    packed = FluxPipeline._pack_latents(latents, 2, 4, 6, 8)
    assert torch.equal(to_tokens(latents), packed)
    assert torch.equal(from_tokens(packed, latents.shape), latents)


@pytest.mark.parametrize(("steps", "scale"), [slow((1, 1.0)), slow((4, 1.0)), (5, 3.0)])
def test_our_sampler_with_the_teacher_gives_the_pipelines_own_pixels(
    family: Family, folder: Path, backbone: Any, steps: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, scale = max(steps, family.fewest_steps), scale if family.two_calls else 1.0
    ours = teacher_sampler(backbone, steps, scale).sample(PROMPTS, SEEDS)
    give_our_noise(family, backbone, steps, monkeypatch)
    theirs, visited = family.plain_pixels(folder, backbone, steps, **family.guided(scale))
    levels = backbone.teacher_policy(steps).timesteps
    assert visited == pytest.approx([level for level in levels for _ in range(len(visited) // steps)], abs=1e-6)
    assert ours.std() > 0.02
    assert float((ours - theirs).abs().max()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [name for name, family in FAMILIES.items() if not family.num_frames], indirect=True, scope="module"
)
def test_pictures_of_another_size_are_the_pipelines_own(
    family: Family, folder: Path, backbone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What buckets of other sizes rely on: a network gives latents of any shape the positions of the stock call."""
    wide = family.make(folder)
    wide.prompts = backbone.prompts  # its text encoders are copies
    vars(wide).update(latent_shape=wide.latent_shape_of((32, 64)), text_pipeline=backbone.text_pipeline)
    ours = teacher_sampler(wide, 2, 1.0).sample(PROMPTS, SEEDS)
    give_our_noise(family, wide, 2, monkeypatch)
    theirs, _ = family.plain_pixels(folder, wide, 2, **family.guided(1.0), height=32, width=64)
    assert ours.shape[-2:] == (32, 64) and float((ours - theirs).abs().max()) < 1e-4


def give_our_noise(family: Family, backbone: Any, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the stock schedulers, which draw their own noise, draw what our sampler draws."""
    drawn = family.drawn or family.packed
    fresh = iter([drawn(draws(backbone, f"step{i}")) for i in range(1, steps + 1)])
    for module in (scheduling_flow_match_euler_discrete, scheduling_lcm, scheduling_scm, few_step):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(fresh), raising=False)
    monkeypatch.setattr(torch, "randn_like", lambda *_, **__: next(fresh))


@pytest.mark.parametrize(("family", "timesteps", "options"), STORED, indirect=["family"], scope="module")
def test_a_plain_call_of_an_export_visits_the_stored_levels(
    family: Family,
    backbone: Any,
    tmp_path: Path,
    timesteps: tuple[float, ...],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = RolloutPolicy(timesteps, **options)
    backbone.config.check_export(policy)
    student = backbone.load("student")
    with torch.no_grad():
        for i, p in enumerate(student.parameters()):  # weights that are not the teacher's
            p.mul_(1 + 0.02 * ((i % 5) - 2))
    backbone.save_pipeline(student, policy, tmp_path)
    ours = Sampler(backbone, student, policy).sample(PROMPTS, SEEDS)
    again = family.make(tmp_path)
    again.prompts = backbone.prompts  # its text encoders are copies
    assert torch.equal(ours, Sampler(again, again.load_exported(tmp_path), policy).sample(PROMPTS, SEEDS))

    give_our_noise(family, backbone, len(timesteps), monkeypatch)
    theirs, visited = family.plain_pixels(tmp_path, backbone, len(timesteps), **family.guided(1.0))
    assert visited == pytest.approx(list(timesteps), abs=1e-6)
    assert float((ours - theirs).abs().max()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("heads", [None, 1], ids=["blocks", "blocks and heads"])
def test_a_smaller_student_begins_with_parts_of_the_teacher_and_is_a_smaller_pipeline(
    family: Family, folder: Path, pipeline: Any, heads: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny networks have two or more blocks, of which it keeps the last, and two heads."""
    if heads and not pipeline.head_keys:
        with pytest.raises(ValueError, match="cannot be made narrower"):
            family.make(folder, student_heads=heads)
        return
    teacher = pipeline.load("teacher")
    kept = {name: [len(getattr(teacher.network, name)) - 1] for name in pipeline.block_lists}
    roles = RoleOptions(kept={"student": kept}, heads={"student": heads} if heads else {})
    section = family.make(folder, student_blocks=kept, student_heads=heads).config
    backbone: Any = section.build(torch.device("cpu"), torch.float32, 0, roles)
    backbone.prompts = pipeline.prompts
    student = backbone.load("student")
    assert shapes(student.network) == shapes(type(student.network).from_config(student.network.config))
    renamed = {re.sub(rf"^({'|'.join(kept)})\.\d+", r"\1.0", name): p for name, p in tensors(teacher.network, kept)}
    for name, p in student.network.named_parameters():
        assert torch.equal(p, first_channels(renamed[name], p.shape, teacher.feature_dim))
    assert heads is None or student.feature_dim * 2 == teacher.feature_dim

    (timesteps, options), empty = family.lists[0], backbone.make_empty()
    assert len(backbone.load("fake_score").state_dict()) == len(empty.state_dict()) > len(student.state_dict())
    policy = RolloutPolicy(timesteps, **options)
    backbone.save_pipeline(student, policy, tmp_path)
    again = family.make(tmp_path)
    again.prompts = pipeline.prompts
    ours = Sampler(backbone, student, policy).sample(PROMPTS, SEEDS)
    assert torch.equal(ours, Sampler(again, again.load_exported(tmp_path), policy).sample(PROMPTS, SEEDS))
    with monkeypatch.context() as patch:
        give_our_noise(family, backbone, len(timesteps), patch)
        theirs, _ = family.plain_pixels(tmp_path, pipeline, len(timesteps), **family.guided(1.0))
    assert float((ours - theirs).abs().max()) < 1e-4
    assert len(backbone.load_start(tmp_path).state_dict()) == len(student.state_dict())
    with pytest.raises(WeightsError, match="heads|dim" if heads else "layers"):
        pipeline.load_start(tmp_path)


def first_channels(tensor: Tensor, shape: torch.Size, width: int) -> Tensor:
    """What is left of a tensor if every group of `width` channels keeps its first half. Z-Image has groups of a third
    of the width."""
    for dim, (size, own) in enumerate(zip(tensor.shape, shape, strict=True)):
        if size != own:
            group = width if size % width == 0 else width // 3
            places = [i for i in range(size) if i % group < group // 2]
            tensor = tensor.index_select(dim, torch.tensor(places))
    return tensor


def tensors(network: nn.Module, kept: dict[str, list[int]]) -> Iterator[tuple[str, Tensor]]:
    """Parameters outside the lists of blocks, and those of the blocks that are kept."""
    for name, p in network.named_parameters():
        listed, place, *_ = [*name.split("."), ""]
        if listed not in kept or int(place) in kept[listed]:
            yield name, p


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in network.state_dict().items()}


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_a_turn_of_each_role_moves_its_weights_and_no_others(pipeline: Any, adapters: bool) -> None:
    roles = RoleOptions({role: LoraConfig(4) for role in ("student", "fake_score")} if adapters else {})
    backbone: Any = pipeline.config.build(torch.device("cpu"), torch.float32, 0, roles)
    policy, objective = RolloutPolicy((1.0, 0.5)), DMD2(guidance_scale=2.0)
    student, teacher = objective.make_student(backbone, policy), backbone.load("teacher")
    networks = Networks({"student": student, "teacher": teacher, **objective.auxiliary(backbone, policy)}, policy)
    cond, uncond = pipeline.encode_both(PROMPTS)
    batch = Batch(torch.arange(2), 0, cond, uncond, backbone.latent_shape)
    check_turns(objective, networks, batch, backbone)


def test_an_adapter_starts_as_the_teacher_and_merges_to_the_same_network(pipeline: Any) -> None:
    backbone = pipeline.config.build(torch.device("cpu"), torch.float32, 0, RoleOptions({"student": LoraConfig(4)}))
    student, teacher = backbone.load("student"), backbone.load("teacher")
    cond, t = pipeline.encode_prompts(PROMPTS), torch.tensor([0.7, 0.3])
    x = draws(backbone, "x")
    assert torch.equal(student(x, t, cond), teacher(x, t, cond))
    for p in student.parameters():
        torch.nn.init.normal_(p, std=0.3)
    with torch.no_grad():
        changed, merged = student(x, t, cond), student.merged()(x, t, cond)
    assert float((changed - merged).abs().max()) < 1e-4
    assert float((changed - teacher(x, t, cond)).abs().max()) > 1e-2


@pytest.mark.parametrize(
    "family",
    [name for name, family in FAMILIES.items() if hasattr(getattr(diffusers, family.pipeline), "load_lora_weights")],
    indirect=True,
    scope="module",
)
def test_an_adapters_file_gives_the_same_network_in_plain_diffusers(
    family: Family, pipeline: Any, tmp_path: Path
) -> None:
    backbone = pipeline.config.build(torch.device("cpu"), torch.float32, 0, RoleOptions({"student": LoraConfig(4)}))
    student, (timesteps, options) = backbone.load("student"), family.lists[0]
    for p in student.parameters():
        torch.nn.init.normal_(p, std=0.1)
    backbone.save_pipeline(student, RolloutPolicy(timesteps, **options), tmp_path)
    cls = getattr(diffusers, family.pipeline)
    parts = pipeline.text_pipeline.components | {"vae": pipeline.vae}
    plain = cls(**parts | {"transformer": pipeline.load("student").network})
    plain.load_lora_weights(str(tmp_path))
    theirs = pipeline.wrap(plain.transformer)
    theirs.tell(pipeline.guidance_told("student"))
    cond, t, x = pipeline.encode_prompts(PROMPTS), torch.tensor([0.7, 0.3]), draws(pipeline, "x")
    with torch.no_grad():
        assert torch.equal(theirs(x, t, cond), student(x, t, cond))


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [name for name, family in FAMILIES.items() if hasattr(getattr(diffusers, family.pipeline), "load_lora_weights")],
    indirect=True,
    scope="module",
)
def test_an_adapter_of_somebody_else_is_added_to_a_sampler(family: Family, folder: Path, tmp_path: Path) -> None:
    """Here it is the adapter of a student, added to the teacher at half its scale, and then once more."""
    backbone: Any = family.make(folder).config.build(
        torch.device("cpu"), torch.float32, 0, RoleOptions({"student": LoraConfig(4)})
    )
    student, (timesteps, options) = backbone.load("student"), family.lists[0]
    for p in student.parameters():
        torch.nn.init.normal_(p, std=0.1)
    backbone.save_pipeline(student, RolloutPolicy(timesteps, **options), tmp_path)
    plain = family.make(folder)
    cond, t, x = plain.encode_prompts(PROMPTS), torch.tensor([0.7, 0.3]), draws(plain, "x")
    sampler = teacher_sampler(plain, 4, 1.0)
    sampler.denoiser.tell(backbone.guidance_told("student"))
    with torch.no_grad():
        before, wanted = sampler.denoiser(x, t, cond), student(x, t, cond)
        adapted = with_adapters(sampler, [Adapter(tmp_path, 0.5), Adapter(tmp_path, 0.5)])
        found = adapted.denoiser(x, t, cond)
    assert float((found - wanted).abs().max()) < 1e-4 < float((found - before).abs().max())


def test_a_family_stores_adapters_where_plain_diffusers_loads_them(family: Family, backbone: Any) -> None:
    assert backbone.stores_adapters == hasattr(backbone.pipeline_class, "load_lora_weights")


def test_recomputing_activations_changes_no_gradient_and_features_have_their_width(backbone: Any) -> None:
    student = backbone.load("student")
    cond, t, x = backbone.encode_prompts(PROMPTS), torch.tensor([0.7, 0.3]), draws(backbone, "x")
    found = []
    for _ in range(2):
        student.zero_grad()
        with student.capture() as features:
            student(x, t, cond).square().mean().backward()
        assert len(features) == len(student.feature_modules)
        assert {value.shape[-1] for value in features} == {student.feature_dim}
        found.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
        student.enable_checkpointing()
    assert torch.equal(*found)


def test_extra_inputs_change_nothing_at_first_and_arrive_in_their_own_unit(backbone: Any) -> None:
    student, x, t = backbone.load("student"), draws(backbone, "x"), torch.tensor([0.7, 0.3])
    cond, inputs = backbone.encode_prompts(PROMPTS), Inputs(s=torch.tensor([0.2, 0.0]), stop=torch.tensor([3, 1]))
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        before = student(x, t, cond)
        student.add_inputs({"stop": 4}, backbone.time_dim, ["s"])
        embedding: Any = student.time_embedding
        for name, table in embedding.tables.items():
            table.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0]}))
        assert torch.equal(student(x, t, cond, inputs), before)
        assert torch.allclose(seen["s"], torch.tensor([0.5, 0.3]))
        assert torch.allclose(seen["stop"], torch.tensor([3.0, 1.0]))
        torch.nn.init.normal_(embedding.tables["s"].weight)
        assert not torch.equal(student(x, t, cond, inputs), before)


def test_a_network_in_bfloat16_computes_the_same_but_for_its_rounding(pipeline: Any) -> None:
    cond, t, x = pipeline.encode_prompts(PROMPTS), torch.tensor([0.7, 0.3]), draws(pipeline, "x")
    student, half = (
        pipeline.config.build(torch.device("cpu"), dtype, 0).load("student")
        for dtype in (torch.float32, torch.bfloat16)
    )
    kind = student.prediction_type
    with torch.no_grad():
        exact, rounded = student(x, t, cond, predict=kind), half(x, t, cond.to(torch.bfloat16), predict=kind)
    assert half.weight_dtype == torch.bfloat16 and rounded.dtype == torch.float32
    assert float((exact - rounded).norm() / exact.norm()) < 0.1


def test_images_go_through_the_vae_and_back(family: Family, backbone: Any) -> None:
    pixels = torch.rand(2, *[family.num_frames] * bool(family.num_frames), 3, SIDE, SIDE)
    latents = backbone.encode(pixels)
    assert latents.shape[1:] == backbone.latent_shape
    frames = (pixels * 2 - 1)[:, :, None] if family.video else pixels * 2 - 1
    code = backbone.vae.encode(frames.transpose(1, 2) if family.num_frames else frames)
    z = code.latent_dist.mode() if hasattr(code, "latent_dist") else code.latent
    z = z.transpose(1, 2) if family.num_frames else family.arranged(z[:, :, 0] if family.video else z)
    mean, std = backbone.latent_moments()
    assert torch.allclose(latents * std + mean, z, atol=1e-5)
    assert backbone.decode(latents).shape == pixels.shape


def test_shapes_of_prompts_are_known_without_weights(backbone: Any) -> None:
    cond = backbone.encode_prompts(PROMPTS)
    assert {key: tuple(value.shape[1:]) for key, value in cond.items()} == backbone.prompt_shapes()


def test_each_prompt_of_a_batch_gives_what_it_gives_alone(backbone: Any) -> None:
    prompts, t = ["a", "a red cat", "", "two green dogs"], torch.tensor([0.7, 0.3, 0.9, 0.5])
    student, x = backbone.load("student"), noise.normal(torch.arange(4), backbone.latent_shape, 0)
    output = partial(student, predict=student.prediction_type)
    with torch.no_grad():
        together = output(x, t, backbone.encode_prompts(prompts))
        for i, prompt in enumerate(prompts):
            alone = output(x[i : i + 1], t[i : i + 1], backbone.encode_prompts([prompt]))
            assert torch.allclose(together[i : i + 1], alone, atol=1e-5), prompt
        again = output(x[:1], t[:1], backbone.encode_prompts(["two green dogs"]))
    assert float((again - together[:1]).abs().max()) > 1e-3  # the prompt matters


# --- FLUX.1


def test_each_role_is_told_its_guidance(tmp_path: Path) -> None:
    family = FAMILIES["flux-dev"]
    options = {"guidance": {"teacher": 2.0, "fake_score": 1.0}}
    folder = family.folder(tmp_path)
    for adapters in ({}, {role: LoraConfig(4) for role in ("student", "fake_score")}):
        config = family.make(folder, **options).config
        backbone: Any = config.build(torch.device("cpu"), torch.float32, 0, RoleOptions(adapters))
        cond, t, x = backbone.encode_prompts(PROMPTS), torch.tensor([0.7, 0.3]), draws(backbone, "x")
        told: list[float] = []

        def note(_module: object, _arguments: object, given: dict[str, Any], told: list[float] = told) -> None:
            told.append(float(given["guidance"][0]))

        networks = {role: backbone.load(role) for role in ("student", "teacher", "fake_score")}
        base = backbone.shared.denoiser if adapters else None
        for denoiser in networks.values():
            hook = (base or denoiser).network.register_forward_pre_hook(note, with_kwargs=True)
            denoiser(x, t, cond)
            hook.remove()
        assert told == [3.5, 2.0, 1.0]
        with torch.no_grad():
            merged = networks["student"].merged()
            assert torch.equal(merged(x, t, cond), networks["student"](x, t, cond))


def test_other_roles_are_told_what_the_role_they_come_from_is_told(tmp_path: Path) -> None:
    family = FAMILIES["flux-dev"]
    backbone = family.make(family.folder(tmp_path), guidance={"student": 1.0, "teacher": 2.0, "fake_score": 3.0})
    roles = ("student", "reference", "teacher", "features", "fake_score", "path1")
    assert [backbone.guidance_told(role) for role in roles] == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]


def test_schnell_is_told_none_and_a_role_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    family = FAMILIES["flux-schnell"]
    folder = family.folder(tmp_path)
    assert family.make(folder).load("student").guidance is None
    with pytest.raises(ValueError, match="is told no guidance scale"):
        family.make(folder, guidance={"student": 1.0})
    with pytest.raises(ValueError, match="guidance"):
        family.make(folder, guidance={"studnet": 1.0})


# --- Sana


def test_prompts_and_negative_prompts_of_sana_are_those_of_its_pipelines_call(tmp_path: Path) -> None:
    """Only the prompts have the instruction that the call has by default, or the one of the recipe."""
    family = FAMILIES["sana"]
    folder = family.folder(tmp_path)
    for given in ("stock", ["Draw ", "this: "], []):
        backbone: Any = family.make(folder, complex_human_instruction=given, negative_prompt="blurred")
        cond, uncond = backbone.encode_both(PROMPTS)
        seen: list[dict[str, Any]] = []
        pipeline = SanaPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.transformer.register_forward_pre_hook(lambda *a, s=seen: s.append(a[2]), with_kwargs=True)
        more = {} if given == "stock" else {"complex_human_instruction": given}
        pipeline(
            PROMPTS,
            "blurred",
            num_inference_steps=1,
            height=32,
            width=32,
            max_sequence_length=LENGTH,
            use_resolution_binning=False,
            output_type="latent",
            **more,
        )
        assert torch.equal(seen[0]["encoder_attention_mask"], torch.cat([uncond["mask"], cond["mask"]]))
        theirs, ours = seen[0]["encoder_hidden_states"], torch.cat([uncond["prompt_embeds"], cond["prompt_embeds"]])
        assert torch.allclose(theirs, ours, atol=1e-5)


def test_the_network_of_sana_sprint_and_a_scheduler_of_another_diffusion_are_refused(tmp_path: Path) -> None:
    family = FAMILIES["sana"]
    folder = family.folder(tmp_path)
    for name, key, value, message in (
        ("transformer/config.json", "guidance_embeds", True, "Sana-Sprint"),
        ("transformer/config.json", "timestep_scale", 1000.0, "Sana-Sprint"),
        ("scheduler/scheduler_config.json", "use_flow_sigmas", False, "flow matching"),
    ):
        path = folder / name
        text = path.read_text()
        path.write_text(json.dumps(json.loads(text) | {key: value}))
        with pytest.raises(ValueError, match=message):
            family.make(folder)
        path.write_text(text)


def test_the_card_of_a_sana_export_calls_it_as_it_was_trained(tmp_path: Path) -> None:
    family = FAMILIES["sana"]
    backbone = family.make(family.folder(tmp_path), complex_human_instruction=["Draw: "])
    assert "height=32, width=32, max_sequence_length=12, complex_human_instruction=['Draw: ']" in backbone.call
    assert "binning" not in backbone.call  # 32 is the network's own size
    assert "use_resolution_binning=False" in family.make(tmp_path, resolution=48).call


# --- added inputs


@pytest.mark.parametrize("inputs", [{"two_time": True}, {"embedded_guidance": 3.0}], ids=["two_time", "guidance"])
@pytest.mark.parametrize("name", PIPELINES)
def test_added_inputs_are_refused_where_no_pipeline_of_ours_gives_them(name: str, inputs: dict[str, Any]) -> None:
    cls = dict(family_configs())[name]
    config, policy = cls(path="org/name"), RolloutPolicy((1.0,), "ode", **inputs)  # a hub id, of which nothing is read
    config.check_export(RolloutPolicy((1.0,), "ode"))
    if all(hasattr(flow_map, f"FlowMap{pipeline}") for pipeline in cls.pipelines):
        config.check_export(policy)
        return
    with pytest.raises(
        ValueError, match=f"no pipeline can sample a student of backbone {name} with {next(iter(inputs))}"
    ):
        config.check_export(policy)


def test_a_recipe_whose_export_could_not_hold_its_inputs_is_refused_before_weights_load(project: Path) -> None:
    with pytest.raises(RecipeError, match=r"rollout: no pipeline can sample .* with embedded_guidance.*leave it out"):
        load_recipe(
            project / "recipes/sana_600m_scm_2step.yaml",
            ["rollout.embedded_guidance=4.5", "objective.guidance_range=[4, 5]"],
        )
