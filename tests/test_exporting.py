"""Students in the files of other programs: read back by diffusers' loaders, and by what is known of ComfyUI's."""

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from comfyui_reader import check_graph, lora_deltas, parse_sigmas, read_float8, sample, stock_converter
from diffusers.loaders import single_file_model
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_families import FAMILIES
from tiny_pipelines import tiny_sd, tiny_sdxl, tiny_vae, with_scheduler
from tiny_wan import tiny_wan
from torch import Tensor
from typer.testing import CliRunner

from fastgen import noise
from fastgen.backbones.base import RoleOptions
from fastgen.backbones.comfyui import comfyui_sampling
from fastgen.backbones.pipeline import CONFIGS, PipelineConfig
from fastgen.backbones.sd import SDConfig
from fastgen.backbones.sd3 import SD3Config
from fastgen.backbones.wan import WanConfig
from fastgen.cli import app
from fastgen.config import load_recipe
from fastgen.exporting.comfyui import workflow
from fastgen.exporting.files import of_tensors
from fastgen.exporting.forms import export_form, write_form
from fastgen.exporting.ldm import unet_name
from fastgen.exporting.names import FAMILIES as FAMILIES_OF_FORMS
from fastgen.exporting.names import OTHERWISE, check_form
from fastgen.exporting.reading import Student
from fastgen.exporting.steps import with_steps
from fastgen.exporting.transformers import in_original_layout
from fastgen.exporting.usage import write_usage
from fastgen.modules.lora import LoraConfig
from fastgen.rollout import RolloutPolicy
from fastgen.run.export import export
from fastgen.sampling.sampler import Sampler
from fastgen.schedule import VPSchedule
from fastgen.train import train

ROOT = Path(__file__).parents[1]
SEEDS = [3, 1]


@dataclass(frozen=True)
class Case:
    """folder: writes a tiny pipeline, or finds one. config: its backbone section. call: of the stock pipeline."""

    folder: Callable[[Path], Path]
    config: Callable[[Path], PipelineConfig]
    prompts: list[str]
    policy: RolloutPolicy = field(default_factory=lambda: RolloutPolicy((1.0, 0.6), "ode"))
    call: dict[str, Any] = field(default_factory=dict)


def of_family(name: str) -> Case:
    family = FAMILIES[name]
    size = {"height": 32, "width": 32, **family.lengths, **family.call}
    return Case(family.folder, lambda folder: family.make(folder).config, ["a red cat", "two green dogs"], call=size)


def with_attention(folder: Path) -> Path:
    """A Stable Diffusion whose VAE has attention, as the published one has."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tiny_vae(scaling_factor=0.18215, mid_block_add_attention=True).save_pretrained(tiny_sd(folder) / "vae")
    return folder


def wan_config(folder: Path) -> WanConfig:
    return WanConfig(str(folder), height=32, width=32, num_frames=5, max_sequence_length=8)


WAN = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 8, "guidance_scale": 1.0}
SD = RolloutPolicy((1.0, 0.5), "renoise")
CASES = {
    "sd": Case(with_attention, lambda folder: SDConfig(str(folder)), ["a red cat", "b"], SD),
    "sdxl": Case(
        lambda folder: tiny_sdxl(folder, second=24), lambda folder: SDConfig(str(folder)), ["a red cat", "b"], SD
    ),
    "sd3": Case(lambda _: ROOT / "assets/teachers/digits", lambda folder: SD3Config(str(folder)), ["a three", "b"]),
    "flux-dev": of_family("flux-dev"),
    "qwen-image": of_family("qwen-image"),
    "wan": Case(tiny_wan, wan_config, ["a cat runs", "a dog"], call=WAN),
    "wan-experts": Case(lambda f: tiny_wan(f, experts=2), wan_config, ["a cat runs", "a dog"], call=WAN),
}
TRANSFORMERS = [name for name in CASES if name not in ("sd", "sdxl")]


class Written:
    """An adapter that is no longer at its start, as an export, merged as another, and in other forms."""

    def __init__(self, case: Case, folder: Path):
        self.spec, self.folder = case, folder
        self.base = case.folder(folder / "base")
        config = case.config(self.base)
        self.backbone: Any = config.build(
            torch.device("cpu"), torch.float32, 0, RoleOptions({"student": LoraConfig(rank=4, alpha=8)})
        )
        self.student = self.backbone.load("student")
        for i, p in enumerate(self.student.parameters()):
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(i))
        self.backbone.save_pipeline(self.student, case.policy, folder / "adapter")
        self.backbone.save_pipeline(self.student.merged(), case.policy, folder / "merged")
        self.pixels = self.stock_pixels(self.pipeline(folder / "merged"))

    def form(self, form: str) -> Path:
        """The folder of the student in this form."""
        path = self.folder / form
        if not path.exists():
            source = self.folder / ("adapter" if form == "lora" else "merged")
            write_form(Student(source, self.backbone, self.spec.policy, form == "lora"), form, path, "tiny")
        return path

    def files(self, form: str) -> list[Path]:
        return [self.form(form) / name for name in json.loads((self.form(form) / "form.json").read_text())["files"]]

    def pipeline(self, folder: Path, **given: Any) -> Any:
        """The stock pipeline. The schedulers of students draw noise; all calls here make Euler steps instead."""
        pipeline = getattr(diffusers, self.backbone.components["_class_name"]).from_pretrained(folder, **given)
        return self.with_euler(pipeline)

    def with_euler(self, pipeline: Any) -> Any:
        vp = "UNet" in self.backbone.network_class
        pipeline.scheduler = diffusers.DDIMScheduler() if vp else diffusers.FlowMatchEulerDiscreteScheduler()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def stock_pixels(self, pipeline: Any) -> Tensor:
        out = pipeline(
            self.spec.prompts[0],
            num_inference_steps=2,
            output_type="np",
            generator=torch.Generator().manual_seed(0),
            **{"guidance_scale": 1.0} | self.spec.call,
        )
        return torch.from_numpy(out.frames if hasattr(out, "frames") else out.images)

    def network_config(self, part: str) -> dict[str, Any]:
        return {"config": str(self.base), "subfolder": part}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    known: dict[str, Written] = {}

    def find(name: str) -> Written:
        if name not in known:
            known[name] = Written(CASES[name], tmp_path_factory.mktemp(name))
        return known[name]

    return find


# --- LoRA


@pytest.mark.parametrize("name", CASES)
def test_comfyui_reads_an_adapter_whole(name: str, written: Callable[[str], Written]) -> None:
    """What it adds to the authors' tensors, converted by diffusers, is what the adapter adds; no key is left over."""
    case = written(name)
    component = case.backbone.subfolder
    merged, base = (case.pipeline(folder).components for folder in (case.folder / "merged", case.base))
    whole = case.files("checkpoint" if component == "unet" else "diffusion_model")
    for part, lora_file, file in zip(case.backbone.subfolders, case.files("lora"), whole, strict=True):
        lora, network = load_file(lora_file), base[part]
        original = {k: v for k, v in load_file(file).items() if not k.startswith(("first", "cond"))}
        deltas, unused = lora_deltas(lora, original, network, component)
        assert not unused, sorted(unused)[:3]
        read = stock_converter(network)(deltas)
        ours = merged[part].state_dict()
        changed = 0
        for key, before in network.state_dict().items():
            difference = ours[key] - before
            assert torch.allclose(read[key].reshape(before.shape), difference, atol=1e-5), key
            changed += bool(difference.abs().max() > 1e-3)
        print(f"{part}: {changed} layers, {len(lora)} keys")
        assert changed == sum(key.endswith(("lora_A.weight", "lora_down.weight")) for key in lora) > 0


@pytest.mark.parametrize("name", CASES)
def test_diffusers_reads_the_same_adapter_to_the_same_pixels(name: str, written: Callable[[str], Written]) -> None:
    case = written(name)
    pipeline = case.pipeline(case.base)
    plain = case.stock_pixels(pipeline)
    for i, file in enumerate(case.files("lora")):
        more = {"load_into_transformer_2": True, "adapter_name": "second"} if i else {}
        pipeline.load_lora_weights(file.parent, weight_name=file.name, **more)
    error = float((case.stock_pixels(pipeline) - case.pixels).abs().max())
    print(f"largest difference: {error:.2g}; without the adapter {float((plain - case.pixels).abs().max()):.2g}")
    assert error < 1e-4 < 1e-3 < float((plain - case.pixels).abs().max())


# --- whole networks


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_checkpoint_is_read_by_from_single_file(name: str, written: Callable[[str], Written]) -> None:
    case = written(name)
    cls = getattr(diffusers, case.backbone.components["_class_name"])
    pipeline = cls.from_single_file(str(case.files("checkpoint")[0]), config=str(case.base), local_files_only=True)
    assert float((case.stock_pixels(case.with_euler(pipeline)) - case.pixels).abs().max()) < 1e-5


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_network_in_its_authors_layout_is_read_by_from_single_file(
    name: str, written: Callable[[str], Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = written(name)
    cls = getattr(diffusers, case.backbone.network_class)
    base = case.pipeline(case.base)
    given = {}
    for part, file in zip(case.backbone.subfolders, case.files("diffusion_model"), strict=True):
        entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[cls.__name__]
        convert = stock_converter(getattr(base, part))  # which knows FLUX.1 at other widths, too
        monkeypatch.setitem(entry, "checkpoint_mapping_fn", lambda checkpoint, f=convert, **_: f(checkpoint))
        given[part] = cls.from_single_file(str(file), **case.network_config(part))
    pixels = case.stock_pixels(case.pipeline(case.base, **given))
    assert float((pixels - case.pixels).abs().max()) < 1e-5


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_float8_is_the_network_up_to_its_rounding(name: str, written: Callable[[str], Written]) -> None:
    """Four significant bits: a sixteenth of each number at most, or half of the smallest step near zero."""
    case = written(name)
    for file, exact in zip(case.files("fp8"), case.files("diffusion_model"), strict=True):
        with safe_open(file, framework="pt") as opened:
            stored = json.loads(opened.metadata()["_quantization_metadata"])
        assert stored["format_version"] == "1.0" and stored["layers"]
        read, wanted = read_float8(load_file(file), stored["layers"]), load_file(exact)
        assert read.keys() == wanted.keys()
        for key, value in wanted.items():
            if key.removesuffix(".weight") in stored["layers"]:
                bound = value.abs() / 16 + value.abs().max() / 448 * 2.0**-10
                assert bool(((read[key] - value).abs() <= bound).all()), key
            else:
                assert torch.equal(read[key], value), key
        matrices = [key for key, value in wanted.items() if value.dim() == 2 and "blocks." in key]
        assert {key.removesuffix(".weight") for key in matrices} == stored["layers"].keys()


@pytest.mark.parametrize("name", ["sd3", "flux-dev", "qwen-image"])
def test_gguf_is_read_by_diffusers(
    name: str, written: Callable[[str], Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = pytest.importorskip("gguf")
    case = written(name)
    file, exact = case.files("gguf")[0], load_file(case.files("diffusion_model")[0])
    reader = gguf.GGUFReader(file)
    for tensor in reader.tensors:
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        wanted = exact[tensor.name]
        # half a step of 1/127 of the largest number, and the rounding of that step, which is a float16
        bound = wanted.abs().max() * (0.5 / 127 + 2.0**-11) if tensor.tensor_type.name == "Q8_0" else 0.0
        assert float((values.reshape(wanted.shape) - wanted).abs().max()) <= bound, tensor.name
    assert {tensor.name for tensor in reader.tensors} == exact.keys()
    cls = getattr(diffusers, case.backbone.network_class)
    convert = stock_converter(case.pipeline(case.base).transformer)
    entry = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[cls.__name__]
    monkeypatch.setitem(entry, "checkpoint_mapping_fn", lambda checkpoint, **_: convert(checkpoint))
    config = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
    network = cls.from_single_file(str(file), quantization_config=config, **case.network_config("transformer"))
    pixels = case.stock_pixels(case.pipeline(case.base, transformer=network))
    error = float((pixels - case.pixels).abs().max())
    print(f"largest difference of pixels: {error:.2g}")
    assert error < 0.05


PUBLISHED = {  # whose configs ship with fastgen -> their networks
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "unet",
    "stabilityai/stable-diffusion-xl-base-1.0": "unet",
    "stabilityai/stable-diffusion-3-medium-diffusers": "transformer",
    "black-forest-labs/FLUX.1-dev": "transformer",
    "Qwen/Qwen-Image": "transformer",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "transformer",
}


@pytest.mark.parametrize(("name", "part"), PUBLISHED.items())
def test_each_tensor_of_a_published_network_has_its_place(name: str, part: str) -> None:
    """At their real sizes, without memory: diffusers' own converter makes of our layout what it was made from."""
    config = json.loads((CONFIGS / name / part / "config.json").read_text())
    cls = getattr(diffusers, config["_class_name"])
    with torch.device("meta"):
        network = cls.from_config(config)
    tensors = network.state_dict()
    if part == "unet":
        original = {f"model.diffusion_model.{unet_name(key, config)}": value for key, value in tensors.items()}
    else:
        original = {entry.name: entry.read() for entry in in_original_layout(of_tensors(tensors), config)}
    function: Any = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[cls.__name__]["checkpoint_mapping_fn"]
    read = function(dict(original), config=network.config)
    assert {key: value.shape for key, value in read.items()} == {key: value.shape for key, value in tensors.items()}
    print(f"{len(tensors)} tensors, {len(original)} in the original layout")


# --- sampling in ComfyUI


@pytest.mark.parametrize("form", ["lora", "whole"])
@pytest.mark.parametrize("name", CASES)
def test_the_workflow_samples_what_our_sampler_samples(
    name: str, form: str, written: Callable[[str], Written]
) -> None:
    """The graph is well formed and at cfg 1; its sampler at its sigmas gives our latents, network by network."""
    case = written(name)
    whole = "checkpoint" if case.backbone.subfolder == "unet" else "diffusion_model"
    folder = case.form("lora" if form == "lora" else whole)
    nodes = json.loads((folder / "workflow.json").read_text())
    check_graph(nodes)
    stages = [node["inputs"] for node in nodes.values() if node["class_type"] == "SamplerCustomAdvanced"]
    assert all(nodes[stage["guider"][0]]["inputs"]["cfg"] == 1 for stage in stages)
    names = {nodes[stage["sampler"][0]]["inputs"]["sampler_name"] for stage in stages}
    parts = [parse_sigmas(nodes[stage["sigmas"][0]]["inputs"]["sigmas"]) for stage in stages]
    assert all(a[-1] == b[0] for a, b in itertools.pairwise(parts)) and parts[-1][-1] == 0
    sigmas = [*(sigma for part in parts for sigma in part[:-1]), 0.0]
    backbone, denoiser = case.backbone, case.student
    cond, flow = backbone.encode_prompts(case.spec.prompts), backbone.config.flow_matching

    def predict(x: Tensor, sigma: float) -> Tensor:
        t = sigma if flow else float((comfyui_levels() - sigma).abs().argmin() + 1) / 1000
        x_t = x if flow else x / (1 + sigma**2) ** 0.5
        with torch.no_grad():
            return denoiser(x_t, torch.full((len(x),), t), cond)

    def draw(i: int) -> Tensor:
        key = noise.make_key("sample", f"step{i}" if i else "initial")
        return noise.normal(torch.tensor(SEEDS), backbone.latent_shape, key)

    theirs = sample(predict, names.pop(), sigmas, draw, flow)
    ours = Sampler(backbone, denoiser, case.spec.policy).latents(case.spec.prompts, SEEDS)
    assert float((theirs - ours).abs().max()) < 1e-4
    page = (folder / "README.md").read_text()
    assert nodes[stages[0]["sigmas"][0]]["inputs"]["sigmas"].split(", ")[0] in page and "| cfg | 1 |" in page


def comfyui_levels() -> Tensor:
    """Its sigmas of Stable Diffusion's 1000 steps, of which it takes the nearest."""
    left = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2).cumprod(0)
    return ((1 - left) / left).sqrt()


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (RolloutPolicy((1.0, 0.5), "cps", 0.5), "transition: cps"),
        (RolloutPolicy((1.0,), conditioning_time=0.5), "is told another one"),
    ],
)
def test_what_comfyui_cannot_sample_is_said_in_place_of_a_workflow(
    policy: RolloutPolicy, words: str, written: Callable[[str], Written], tmp_path: Path
) -> None:
    case = written("sd3")
    write_usage(Student(case.folder / "merged", case.backbone, policy, False), "diffusion_model", ["x"], tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "There is no workflow for ComfyUI" in page and words in page and "from_single_file" in page
    assert not (tmp_path / "workflow.json").exists()


def test_another_noise_schedule_than_stable_diffusions_has_no_workflow(written: Callable[[str], Written]) -> None:
    backbone = copy.copy(written("sd").backbone)
    backbone.schedule = VPSchedule(diffusers.DDIMScheduler(beta_schedule="linear").alphas_cumprod)
    with pytest.raises(ValueError, match="the noise schedule of Stable Diffusion"):
        comfyui_sampling(backbone, SD)


def test_the_workflow_of_an_adapter_names_its_base_and_its_prediction(tmp_path: Path) -> None:
    """FLUX.1 schnell is another file than dev, and ComfyUI takes Stable Diffusion for an epsilon model."""
    schnell = FAMILIES["flux-schnell"]
    velocity = with_scheduler(tiny_sd(tmp_path / "sd"), tmp_path / "v", "DDIMScheduler", "v_prediction")
    for config, words in (
        (schnell.make(schnell.folder(tmp_path / "schnell")).config, "flux1-schnell.safetensors"),
        (SDConfig(str(velocity)), "v_prediction"),
    ):
        backbone: Any = config.build(torch.device("cpu"), torch.float32, 0)
        nodes = workflow(Student(tmp_path / "none", backbone, SD, True), "lora", ["mine.safetensors"])
        check_graph(nodes)
        assert any(words in map(str, node["inputs"].values()) for node in nodes.values())
        assert "FluxGuidance" not in {node["class_type"] for node in nodes.values()}


def test_a_student_that_starts_below_the_last_step_has_no_workflow(written: Callable[[str], Written]) -> None:
    with pytest.raises(ValueError, match=r"starts at level 0\.4 from noise of full size"):
        comfyui_sampling(written("sd").backbone, RolloutPolicy((0.4,)))


# --- the command


def exported(folder: Path, *overrides: str) -> Path:
    """An export of the digits teacher, which was not trained."""
    recipe = load_recipe(ROOT / "recipes/digits_dmd2_4step.yaml", [f"output_dir={folder}/mine", *overrides])
    backbone = recipe.backbone.build(torch.device("cpu"), torch.float32, 0, RoleOptions(recipe.lora))
    export(backbone.load("student"), backbone, recipe, folder / "export", 0)
    return folder / "export"


ADAPTER = "lora={student: {rank: 2}}"


def test_an_export_is_written_in_another_form_and_replaced_by_the_next(tmp_path: Path) -> None:
    source = exported(tmp_path, ADAPTER)
    folder = export_form(source, "lora")
    names = {path.name for path in folder.iterdir()}
    assert folder == source / "export_lora"
    assert names == {"mine_lora.safetensors", "scheduler", "workflow.json", "README.md", "form.json"}
    assert export_form(source, "lora") == folder
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="holds no student in another form"):
        export_form(source, "lora", tmp_path / "other")
    with pytest.raises(ValueError, match="give the run folder"):
        export_form(source, "fp8")
    with pytest.raises(ValueError, match="leave out --merge"):
        export_form(source, "lora", merge=True)
    with pytest.raises(ValueError, match="neither a run nor an export"):
        export_form(tmp_path, "lora")
    assert not list(source.glob(".*"))


def test_one_adapter_serves_several_numbers_of_steps_where_all_levels_were_trained(tmp_path: Path) -> None:
    overrides = [f"output_dir={tmp_path}/mine", ADAPTER, "objective.grid.count=16"]
    recipe = load_recipe(ROOT / "recipes/digits_consistency_4step.yaml", overrides)
    backbone = recipe.backbone.build(torch.device("cpu"), torch.float32, 0, RoleOptions(recipe.lora))
    export(backbone.load("student"), backbone, recipe, tmp_path / "export", 0)
    folder = export_form(tmp_path / "export", "lora", steps=[2, 8])
    for count in (2, 8):
        nodes = json.loads((folder / f"{count}_steps/workflow.json").read_text())
        check_graph(nodes)
        sigmas = next(node["inputs"]["sigmas"] for node in nodes.values() if node["class_type"] == "ManualSigmas")
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / f"{count}_steps/scheduler")
        scheduler.set_timesteps(count)
        assert parse_sigmas(sigmas) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)
        page = (folder / f"{count}_steps/README.md").read_text()
        assert 'load_lora_weights("path/to/this/folder/.."' in page and f"num_inference_steps={count}" in page
    few = load_recipe(ROOT / "recipes/digits_consistency_4step.yaml", [])
    assert with_steps(few, 2).timesteps == (1.0, 0.5)
    with pytest.raises(ValueError, match=r"8 steps need the level 0\.875"):
        with_steps(few, 8)
    dmd2 = exported(tmp_path / "dmd2", ADAPTER)
    with pytest.raises(ValueError, match="4 steps and no others: dmd2"):
        export_form(dmd2, "lora", steps=[2])


@pytest.mark.parametrize(
    ("name", "form", "overrides", "words"),
    [
        ("mixture_dmd2_4step", "lora", [], "no diffusers pipeline"),
        ("digits_dmd2_4step", "lora", [], "this student is no adapter"),
        ("digits_dmd2_4step", "checkpoint", [], "--form diffusion_model"),
        ("digits_flow_map_4step", "diffusion_model", [], "takes s besides"),
    ],
)
def test_what_has_no_such_form_is_refused_before_weights_load(
    name: str, form: str, overrides: list[str], words: str
) -> None:
    recipe = load_recipe(ROOT / f"recipes/{name}.yaml", overrides)
    with pytest.raises(ValueError, match=words):
        check_form(form, recipe, "student" in recipe.lora)


def test_every_family_has_a_form_or_a_reason() -> None:
    """Of the documented table, each cell: what is refused says why, in words of its own."""
    table = (ROOT / "docs/exporting.md").read_text()
    for form, families in FAMILIES_OF_FORMS.items():
        for family in ("sd", "sd3", "flux", "qwen_image", "wan", "sana"):
            row = next(line for line in table.splitlines() if line.startswith(f"| `{family}` "))
            cell = row.split("|")[2 + list(FAMILIES_OF_FORMS).index(form)].strip()
            assert cell.startswith("refused") == (family not in families), (family, form, cell)
            if family not in families:
                keys = ((form, family), ("", family), (form, ""))
                assert any(key in OTHERWISE for key in keys), (family, form)


PLAIN = {"sd": "50 steps instead of 2 and guidance scale 7.5", "sdxl": "scale 5 instead", "sd3": "scale 7 instead"}
PLAIN |= {
    "flux-dev": "use 28 steps instead of 2.",
    "qwen-image": "use 50 steps instead of 2.",
    "wan": "scale 5 instead",
}


@pytest.mark.parametrize(("name", "words"), PLAIN.items())
def test_the_card_begins_with_what_a_plain_call_would_do(
    name: str, words: str, written: Callable[[str], Written]
) -> None:
    case = written(name)
    assert words in case.backbone.plain_call(case.spec.policy)
    steps = case.backbone.stock_call[0]
    same = dataclasses.replace(case.spec.policy, timesteps=tuple((steps - i) / steps for i in range(steps)))
    assert "steps instead" not in case.backbone.plain_call(same)


@pytest.mark.slow
def test_a_run_is_exported_in_another_form_by_the_command(tmp_path: Path) -> None:
    """From the last checkpoint of a LoRA run: the adapter alone, and with it in the weights."""
    small = ["train.steps=1", "train.batch_size=2", "train.checkpoint_every=1", "train.sample_every=0"]
    small += ["train.eval_every=0", "objective.fake_updates=1", "health.num_samples=4", "eval.metrics=[throughput]"]
    small += ["eval.quick_num_samples=20", "eval.teacher_steps=[2]", "train.num_samples=4"]
    adapters = "lora={student: {rank: 2}, fake_score: {rank: 2}}"
    recipe = load_recipe(ROOT / "recipes/digits_dmd2_4step.yaml", [*small, adapters, f"output_dir={tmp_path}/run"])
    run = train(recipe)
    for form, key in (("lora", "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"), ("fp8", "pos_embed")):
        result = CliRunner().invoke(app, ["export", str(run), "--form", form, "--output", str(tmp_path / form)])
        assert result.exit_code == 0, result.stderr
        assert key in load_file(tmp_path / form / f"run_{form}.safetensors")
    result = CliRunner().invoke(app, ["export", str(run), "--form", "checkpoint"])
    assert result.exit_code == 2 and "--form diffusion_model" in result.stderr
    result = CliRunner().invoke(app, ["export", str(run), "--steps", "2"])
    assert result.exit_code == 2 and "give --form" in result.stderr
    assert not list(tmp_path.glob(".*"))
