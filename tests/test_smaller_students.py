"""Students with fewer blocks or heads than their teacher: training, exports, what they start from, and refusals.
(tests/test_families.py has every family's network.)"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file
from test_distributed import SMALL, compare, run
from tiny_dit import tiny_dit
from tiny_pipelines import tiny_sd
from tiny_wan import tiny_wan
from tiny_wan_i2v import KINDS, tiny_wan_i2v

from fastgen.backbones.base import RoleOptions
from fastgen.backbones.dit import DiTConfig
from fastgen.backbones.pipeline_config import CONFIGS, family_configs
from fastgen.backbones.sd import SDConfig
from fastgen.backbones.sd3 import SD3Config
from fastgen.backbones.wan import WanConfig
from fastgen.backbones.wan_i2v import WanI2VConfig
from fastgen.backbones.wan_vace import WanVACEConfig
from fastgen.config import load_recipe
from fastgen.modules.experts import Experts
from fastgen.modules.kept_heads import Width, cut
from fastgen.pipelines.streaming import StreamingWanPipeline
from fastgen.planning.plan import plan
from fastgen.policy import ChunkSchedule
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy
from fastgen.run import checkpoint
from fastgen.sampling.sampler import Sampler, load_sampler
from fastgen.train import train

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "assets/teachers/digits"
RECIPE = ROOT / "recipes/digits_dmd2_4step.yaml"
NETWORKS = sorted(CONFIGS.glob("*/*/transformer/config.json"))
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
TWO = "backbone.student_blocks={transformer_blocks: [1, 3]}"  # of four
NARROW = "backbone.student_heads=2"  # of four


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("small") / "run", 1, TWO)


@pytest.mark.slow
def test_it_trains_and_its_export_is_a_smaller_stock_pipeline(small: Path) -> None:
    config = json.loads((small / "export/transformer/config.json").read_text())
    student, teacher = load_file(small / "export" / WEIGHTS), load_file(TEACHER / WEIGHTS)
    assert config["num_layers"] == 2 and len(student) < len(teacher)
    pairs = {name: name.replace("blocks.1", "blocks.3").replace("blocks.0", "blocks.1") for name in student}
    far = max(float((student[name] - teacher[other]).abs().max()) for name, other in pairs.items())
    assert 0 < far < 0.01  # three updates away from the blocks that it began with
    saved = checkpoint.complete(small / "checkpoints")[-1]
    assert len(checkpoint.stored(saved, "fake_score").shapes) > len(checkpoint.stored(saved, "student").shapes)

    pipeline = StableDiffusion3Pipeline.from_pretrained(small / "export")
    assert len(pipeline.transformer.transformer_blocks) == 2
    samplers = load_sampler(small), load_sampler(small / "export")
    one, other = (sampler.sample(["a seven"], [0]) for sampler in samplers)
    assert float((one - other).abs().max()) < 1e-5


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("narrow") / "run", 1, TWO, NARROW)


@pytest.mark.slow
def test_with_fewer_heads_it_trains_and_its_export_is_a_narrower_stock_pipeline(narrow: Path) -> None:
    config = json.loads((narrow / "export/transformer/config.json").read_text())
    assert (config["num_layers"], config["num_attention_heads"], config["caption_projection_dim"]) == (2, 2, 64)
    student, teacher = load_file(narrow / "export" / WEIGHTS), load_file(TEACHER / WEIGHTS)
    modulation, whole = (
        weights[f"transformer_blocks.{i}.norm1.linear.weight"] for weights, i in ((student, 0), (teacher, 1))
    )
    assert modulation.shape == (6 * 64, 64) and whole.shape == (6 * 128, 128)
    for one, other in zip(modulation.split(64), whole.split(128), strict=True):
        assert 0 < float((one - other[:64, :64]).abs().max()) < 0.01  # three updates away from it
    saved = checkpoint.complete(narrow / "checkpoints")[-1]
    stored = checkpoint.stored(saved, "fake_score").shapes
    assert tuple(stored["network.transformer_blocks.0.norm1.linear.weight"]) == (6 * 128, 128)

    pipeline = StableDiffusion3Pipeline.from_pretrained(narrow / "export")
    table = pipeline.transformer.pos_embed.pos_embed.view(8, 8, 64)
    assert (table[:, :1] - table).abs().amax() > 1 and (table[:1] - table).abs().amax() > 1  # both axes have places
    samplers = load_sampler(narrow), load_sampler(narrow / "export")
    one, other = (sampler.sample(["a seven"], [0]) for sampler in samplers)
    assert float((one - other).abs().max()) < 1e-5


@pytest.mark.slow
@pytest.mark.slow
def test_another_run_starts_from_a_narrower_one_and_one_with_other_heads_does_not(
    narrow: Path, tmp_path: Path
) -> None:
    start = f"init_from={narrow}"
    assert (run(tmp_path / "on", 1, TWO, NARROW, start, "train.steps=1") / "export").is_dir()
    assert (run(tmp_path / "export", 1, TWO, NARROW, f"{start}/export", "train.steps=1") / "export").is_dir()
    for other in ("seed=0", "backbone.student_heads=3"):
        with pytest.raises(RecipeError, match="student_heads the same"):
            load_recipe(RECIPE, [TWO, other, start])
    with pytest.raises(RecipeError, match="has all; name a run or an export"):
        load_recipe(RECIPE, [NARROW, f"init_from={TEACHER}"])


@pytest.mark.slow
def test_a_student_with_two_times_is_told_them_at_its_own_width(tmp_path: Path) -> None:
    """Also those of the student that an export is loaded as."""
    small = [*SMALL[:1], "train.steps=1", "train.batch_size=4", "train.eval_every=0", "train.sample_every=0"]
    few = ["eval.num_samples=20", "eval.quick_num_samples=20", "eval.metrics=[throughput]", "eval.teacher_steps=[]"]
    recipe = load_recipe(
        ROOT / "recipes/digits_flow_map_small_4step.yaml",
        [NARROW, f"output_dir={tmp_path / 'run'}", "health.num_samples=4", *small, *few],
    )
    folder = train(recipe)
    one, other = (load_sampler(path).sample(["a seven"], [0]) for path in (folder, folder / "export"))
    assert float((one - other).abs().max()) < 1e-5


def test_a_plan_counts_the_smaller_student(tmp_path: Path) -> None:
    roles = {}
    for key, keys in {"whole": [], "narrow": [NARROW]}.items():
        found = plan(load_recipe(RECIPE, [*keys, f"output_dir={tmp_path}"]), activations=False)
        roles[key] = {role.name: role.parameters for role in found.roles}
    assert roles["narrow"]["fake_score"] == roles["whole"]["fake_score"]
    assert 0.2 < roles["narrow"]["student"] / roles["whole"]["student"] < 0.4


@pytest.mark.slow
def test_another_run_starts_from_it_and_one_with_other_blocks_does_not(small: Path, tmp_path: Path) -> None:
    start = f"init_from={small}"
    assert (run(tmp_path / "on", 1, TWO, start, "train.steps=1") / "export").is_dir()
    assert (run(tmp_path / "export", 1, TWO, f"{start}/export", "train.steps=1") / "export").is_dir()
    for other in ("seed=0", "backbone.student_blocks={transformer_blocks: [0, 3]}"):
        with pytest.raises(RecipeError, match="student_blocks the same"):
            load_recipe(RECIPE, [other, start])
    with pytest.raises(RecipeError, match="has all; name a run or an export"):
        load_recipe(RECIPE, [TWO, f"init_from={TEACHER}"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backbone.student_blocks={blocks: [0]}"], "no list of blocks blocks .* it has transformer_blocks"),
        (["backbone.student_blocks={transformer_blocks: [3, 1]}"], "each once and in order"),
        (["backbone.student_blocks={transformer_blocks: [1, 4]}"], "places between 0 and 3"),
        (["backbone.student_blocks={transformer_blocks: [0, 1, 2, 3]}"], "all 4 blocks"),
        (["backbone.student_blocks={transformer_blocks: [0, 1]}"], "keep block 3"),
        (["backbone.student_blocks={transformer_blocks: []}"], "student_blocks"),
        ([TWO, "lora={student: {rank: 4}}"], "lora.student"),
        ([TWO, "objective.ida_decay=0.97", "objective.share_rollout=false"], "objective.ida_decay"),
        (["backbone.student_heads=0"], "student_heads"),
        (["backbone.student_heads=4"], "the network has 4 heads; give a number from 1 to 3"),
        ([NARROW, "lora={student: {rank: 4}}"], "backbone.student_heads is not possible: .*lora.student"),
        ([NARROW, "objective.ida_decay=0.97", "objective.share_rollout=false"], "objective.ida_decay"),
        ([NARROW, TWO, "rollout.inner={blocks: 1}"], "student_blocks with backbone.student_heads .*rollout.inner"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_weights_load(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(RECIPE, overrides)


def test_a_unet_has_no_list_to_choose_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no list of blocks down_blocks"):
        SDConfig(path=str(tiny_sd(tmp_path)), student_blocks={"down_blocks": [0]}).check()
    with pytest.raises(ValueError, match="UNet2DConditionModel cannot be made narrower"):
        SDConfig(path=str(tmp_path), student_heads=1).check()


def test_the_first_channels_of_each_group_are_kept() -> None:
    """Six groups of a modulation, a sixth of the width that a key of grouped queries has, and 8 / 3 of the width."""
    width = Width(6, 3)
    assert cut(torch.arange(36), [18], width).tolist() == [6 * group + i for group in range(6) for i in range(3)]
    assert cut(torch.arange(2), [1], width).tolist() == [0]
    assert cut(torch.arange(16), [8], width).tolist() == list(range(0, 16, 2))
    assert cut(torch.arange(7), [7], width).tolist() == list(range(7))
    matrix = torch.arange(12 * 6).view(12, 6)
    assert torch.equal(cut(matrix, [6, 3], width), torch.cat([matrix[:3, :3], matrix[6:9, :3]]))
    for tensor, shape in ((torch.zeros(7), [3]), (torch.zeros(12), [5]), (torch.zeros(6), [3, 3])):
        with pytest.raises(ValueError, match="cannot be cut"):
            cut(tensor, shape, width)


@pytest.mark.slow
@pytest.mark.parametrize("path", NETWORKS, ids=lambda path: path.parts[-3])
def test_half_the_heads_of_every_known_pipeline_make_the_classes_own_network(path: Path) -> None:
    """On the meta device, with two blocks of each kind."""
    folder = path.parents[1]
    index = json.loads((folder / "model_index.json").read_text())
    section = next(cls for _, cls in family_configs() if cls.loads(index))
    backbone: Any = section(path=str(folder)).build(torch.device("cpu"), torch.float32, 0, RoleOptions(deferred=True))
    if not backbone.head_keys:
        with pytest.raises(ValueError, match="cannot be made narrower"):
            backbone.head_settings(1)
        return
    config = backbone.network_config
    config |= {key: 2 for key in ("num_layers", "num_single_layers", "n_layers") if key in config}
    config |= {"vace_layers": [0]} if "vace_layers" in config else {}
    heads = config[backbone.head_keys[0]] // 2
    for part in backbone.narrowed(backbone.make_empty(), heads).members:
        own = type(part.network).from_config(part.network.config)
        assert {n: p.shape for n, p in part.network.state_dict().items()} == {
            n: p.shape for n, p in own.state_dict().items()
        }
        assert part.network.config[backbone.head_keys[0]] == heads


@pytest.mark.parametrize("kind", ["dit", *KINDS])
def test_half_the_heads_in_families_with_more_than_prompts(kind: str, tmp_path: Path) -> None:
    """Labels, given images, two experts, and an attention to the image whose width is a setting of its own."""
    config: Any = DiTConfig(path=str(tiny_dit(tmp_path / "teacher")), student_heads=1) if kind == "dit" else None
    if config is None:
        cls = WanVACEConfig if kind == "vace" else WanI2VConfig
        folder = tiny_wan_i2v(tmp_path / "teacher", kind)
        config = cls(path=str(folder), student_heads=1, height=32, width=32, num_frames=5, max_sequence_length=16)
    config.check()
    backbone = config.build(torch.device("cpu"), torch.float32, 0, RoleOptions(heads={"student": 1}))
    student, policy = backbone.load("student"), RolloutPolicy((1.0, 0.5))
    assert student.members[0].feature_dim * 2 == backbone.load("teacher").members[0].feature_dim
    backbone.save_pipeline(student, policy, tmp_path / "export")
    section = dataclasses.replace(config, path=str(tmp_path / "export"), student_heads=None)
    again = section.build(torch.device("cpu"), torch.float32, 0)
    prompts, images = ["207"], None
    if kind != "dit":
        prompts, images = ["a cat"], backbone.encode_images([torch.rand(3, 32, 32)])
    ours = Sampler(backbone, student, policy).sample(prompts, [0], images)
    theirs = Sampler(again, again.load_exported(tmp_path / "export"), policy).sample(prompts, [0], images)
    assert torch.isfinite(ours).all() and torch.equal(ours, theirs)


def test_blocks_with_a_second_attention_keep_it() -> None:
    """SD3.5 Medium lists the blocks that have one by their places."""
    backbone = SD3Config(path=str(TEACHER)).build(torch.device("cpu"), torch.float32, 0)
    backbone.network_config["dual_attention_layers"] = [0, 2]
    kept = {"transformer_blocks": [1, 2, 3]}
    assert backbone.kept_settings(kept) == {"num_layers": 3, "dual_attention_layers": (1,)}


def test_a_block_may_move_to_where_the_teacher_had_another_kind(tmp_path: Path) -> None:
    """The second block here is the only one with a second attention, and becomes the first."""
    folder = tmp_path / "teacher"
    shutil.copytree(TEACHER, folder)
    config = json.loads((folder / "transformer/config.json").read_text()) | {"dual_attention_layers": [1]}
    SD3Transformer2DModel.from_config(config).save_pretrained(folder / "transformer")
    kept = {"transformer_blocks": [1, 3]}
    section = SD3Config(path=str(folder), student_blocks=kept)
    section.check()
    backbone = section.build(torch.device("cpu"), torch.float32, 0, RoleOptions(kept={"student": kept}))
    student = backbone.load("student")
    backbone.save_pipeline(student, RolloutPolicy((1.0,)), tmp_path / "export")
    again = StableDiffusion3Pipeline.from_pretrained(tmp_path / "export").transformer.state_dict()
    own = student.members[0].network.state_dict()
    assert any("0.attn2" in name for name in own) and own.keys() == again.keys()
    assert all(torch.equal(own[name], again[name]) for name in own)


@pytest.mark.parametrize(
    "kept", [{"kept": {"student": {"transformer_blocks": [1, 3]}}}, {"heads": {"student": 2}}], ids=["blocks", "heads"]
)
def test_two_experts_of_one_teacher_are_exported_smaller(kept: dict[str, Any], tmp_path: Path) -> None:
    backbone = SD3Config(path=str(TEACHER)).build(torch.device("cpu"), torch.float32, 0, RoleOptions(**kept))
    student = Experts([backbone.load("student"), backbone.load("student")], (0.5,))
    backbone.save_pipeline(student, RolloutPolicy((1.0, 0.75, 0.5, 0.25)), tmp_path / "export")
    again = backbone.load_exported(tmp_path / "export")
    assert len(again.members) == 2
    assert all(torch.equal(p, q) for p, q in zip(student.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("heads", [None, 1])
def test_a_causal_student_of_two_blocks(tmp_path: Path, heads: int | None) -> None:
    """Its cache has a place for each block that is left, and for each of its heads."""
    config = WanConfig(
        path=str(tiny_wan(tmp_path / "wan")),
        height=32,
        width=32,
        num_frames=5,
        student_blocks={"blocks": [0, 2]},
        student_heads=heads,
    )
    config.check()
    roles = RoleOptions(kept={"student": config.kept_blocks}, heads={"student": heads} if heads else {})
    backbone = config.build(torch.device("cpu"), torch.float32, 0, roles)
    student, policy = backbone.load("student"), RolloutPolicy((1.0, 0.5), chunks=ChunkSchedule(frames=1))
    backbone.save_pipeline(student, policy, tmp_path / "export")
    pipeline = StreamingWanPipeline.from_pretrained(tmp_path / "export")
    assert len(pipeline.transformer.blocks) == 2
    assert torch.isfinite(pipeline("a cat", seed=0, output_type="pt").frames).all()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("digits_*.yaml")), ids=lambda path: path.stem)
def test_every_objective_of_the_digits_takes_one(recipe: Path, tmp_path: Path) -> None:
    """Also those that keep copies of the student, or make experts of it."""
    settings = yaml.safe_load(recipe.read_text())
    if (
        "student_blocks" in settings["backbone"]
        or settings["objective"].get("ida_decay")
        or recipe.stem == "digits_cdm_4step"
    ):
        pytest.skip("it has one already, or blends the student's weights into the fake score")
    few = [TWO, NARROW, f"output_dir={tmp_path / 'run'}", "init_from=null", "train.steps=1", "train.batch_size=48"]
    quiet = ["train.eval_every=0", "train.sample_every=0", "train.checkpoint_every=0", "eval.teacher_steps=[]"]
    objective = {
        "progressive": ["objective.stage_updates=[1]", "objective.stages=1"],
        "phased_dmd": ["objective.phases=[{first: 0, last: 4, updates: 1}]"],
    }.get(settings["objective"]["name"], [])
    pairs = ["data.pairs={count: 16, steps: 2}"] if "pairs" in settings["data"] else []
    folder = train(load_recipe(recipe, [*few, *quiet, *objective, *pairs]))
    export = json.loads((folder / "export/transformer/config.json").read_text())
    assert (export["num_layers"], export["num_attention_heads"]) == (2, 2)


@pytest.mark.slow
def test_divided_over_two_processes_it_trains_as_on_one(small: Path, narrow: Path, tmp_path: Path) -> None:
    assert compare(small, tmp_path / "two", TWO) < 1e-9
    assert compare(narrow, tmp_path / "narrow", TWO, NARROW) < 1e-9
