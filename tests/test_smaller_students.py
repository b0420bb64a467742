"""Students with fewer blocks than their teacher: training, exports, what they start from, and what is refused.
(tests/test_families.py has every family's network.)"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file
from test_distributed import compare, run
from tiny_pipelines import tiny_sd
from tiny_wan import tiny_wan

from fastgen.backbones.base import RoleOptions
from fastgen.backbones.sd import SDConfig
from fastgen.backbones.sd3 import SD3Config
from fastgen.backbones.wan import WanConfig
from fastgen.config import load_recipe
from fastgen.pipelines.streaming import StreamingWanPipeline
from fastgen.policy import ChunkSchedule
from fastgen.registry import RecipeError
from fastgen.rollout import RolloutPolicy
from fastgen.run import checkpoint
from fastgen.sampling.sampler import load_sampler
from fastgen.train import train

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "assets/teachers/digits"
RECIPE = ROOT / "recipes/digits_dmd2_4step.yaml"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
TWO = "backbone.student_blocks={transformer_blocks: [1, 3]}"  # of four


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("small") / "run", 1, TWO)


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
    ],
)
def test_what_cannot_be_kept_is_refused_before_weights_load(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(RECIPE, overrides)


def test_a_unet_has_no_list_to_choose_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no list of blocks down_blocks"):
        SDConfig(path=str(tiny_sd(tmp_path)), student_blocks={"down_blocks": [0]}).check()


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


def test_a_causal_student_of_two_blocks(tmp_path: Path) -> None:
    """Its cache has a place for each block that is left."""
    config = WanConfig(
        path=str(tiny_wan(tmp_path / "wan")), height=32, width=32, num_frames=5, student_blocks={"blocks": [0, 2]}
    )
    config.check()
    backbone = config.build(torch.device("cpu"), torch.float32, 0, RoleOptions(kept={"student": config.kept_blocks}))
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
    few = [TWO, f"output_dir={tmp_path / 'run'}", "init_from=null", "train.steps=1", "train.batch_size=48"]
    quiet = ["train.eval_every=0", "train.sample_every=0", "train.checkpoint_every=0", "eval.teacher_steps=[]"]
    objective = {
        "progressive": ["objective.stage_updates=[1]", "objective.stages=1"],
        "phased_dmd": ["objective.phases=[{first: 0, last: 4, updates: 1}]"],
    }.get(settings["objective"]["name"], [])
    pairs = ["data.pairs={count: 16, steps: 2}"] if "pairs" in settings["data"] else []
    folder = train(load_recipe(recipe, [*few, *quiet, *objective, *pairs]))
    export = json.loads((folder / "export/transformer/config.json").read_text())
    assert export["num_layers"] == 2


@pytest.mark.slow
def test_divided_over_two_processes_it_trains_as_on_one(small: Path, tmp_path: Path) -> None:
    assert compare(small, tmp_path / "two", TWO) < 1e-9
