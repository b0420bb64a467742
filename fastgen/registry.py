"""Looks up what the names in a recipe stand for: classes, checked values, and files that ship with fastgen.

A table below has the names of a section, each with its "module:Class", which is imported only when it is chosen. A
class outside this package is named by its import path, `my_module:MyClass`. Naming one runs the code of that module.
"""

import dataclasses
import difflib
import importlib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

PACKAGE = Path(__file__).resolve().parent

BACKBONES: dict[str, str] = {
    "ar1_video": "fastgen.backbones.ar1_video:AR1VideoConfig",
    "cogvideox": "fastgen.backbones.cogvideox:CogVideoXConfig",
    "dit": "fastgen.backbones.dit:DiTConfig",
    "flux": "fastgen.backbones.flux:FluxConfig",
    "flux2": "fastgen.backbones.flux2:Flux2Config",
    "gaussian_mixture": "fastgen.backbones.gaussian_mixture:GaussianMixtureConfig",
    "hunyuan_video15": "fastgen.backbones.hunyuan_video15:HunyuanVideo15Config",
    "ltx": "fastgen.backbones.ltx:LTXConfig",
    "ltx2": "fastgen.backbones.ltx2:LTX2Config",
    "pixart_sigma": "fastgen.backbones.pixart_sigma:PixArtSigmaConfig",
    "qwen_image": "fastgen.backbones.qwen_image:QwenImageConfig",
    "qwen_image_edit": "fastgen.backbones.qwen_image_edit:QwenImageEditConfig",
    "sana": "fastgen.backbones.sana:SanaConfig",
    "sana_sprint": "fastgen.backbones.sana_sprint:SanaSprintConfig",
    "sd": "fastgen.backbones.sd:SDConfig",
    "sd3": "fastgen.backbones.sd3:SD3Config",
    "unet2d": "fastgen.backbones.unet2d:UNet2DConfig",
    "wan": "fastgen.backbones.wan:WanConfig",
    "wan_i2v": "fastgen.backbones.wan_i2v:WanI2VConfig",
    "wan_vace": "fastgen.backbones.wan_vace:WanVACEConfig",
    "z_image": "fastgen.backbones.z_image:ZImageConfig",
}
# the backbones whose `path` is a diffusers pipeline
PIPELINES = (
    "cogvideox",
    "dit",
    "flux",
    "flux2",
    "hunyuan_video15",
    "ltx",
    "ltx2",
    "pixart_sigma",
    "qwen_image",
    "qwen_image_edit",
    "sana",
    "sana_sprint",
    "sd",
    "sd3",
    "unet2d",
    "wan",
    "wan_i2v",
    "wan_vace",
    "z_image",
)

DATA: dict[str, str] = {
    "prompts": "fastgen.data.prompts:PromptData",
    "images": "fastgen.data.images:ImageData",
    "videos": "fastgen.data.videos:VideoData",
    "webdataset": "fastgen.data.tar_shards:WebDatasetData",
    "hub": "fastgen.data.hub:HubData",
    "prepared": "fastgen.data.prepared:PreparedData",
    "digits": "fastgen.data.toys:DigitsData",
    "moving_digits": "fastgen.data.moving_digits:MovingDigitsData",
    "digit_views": "fastgen.data.digit_views:DigitViewsData",
    "mixture": "fastgen.data.toys:MixtureData",
    "ar1_video": "fastgen.data.toys:AR1Data",
}

OBJECTIVES: dict[str, str] = {
    "adm": "fastgen.objectives.adm:ADM",
    "adp": "fastgen.objectives.adp:ADP",
    "dmd2": "fastgen.objectives.dmd2:DMD2",
    "f_distill": "fastgen.objectives.f_distill:FDistill",
    "re_dmd": "fastgen.objectives.re_dmd:ReDMD",
    "stream_r1": "fastgen.objectives.stream_r1:StreamR1",
    "asd": "fastgen.objectives.asd:ASD",
    "hiar": "fastgen.objectives.hiar:HiAR",
    "sc_dmd": "fastgen.objectives.sc_dmd:SCDMD",
    "context_forcing": "fastgen.objectives.context_forcing:ContextForcing",
    "long_tuning": "fastgen.objectives.long_tuning:LongTuning",
    "salt": "fastgen.objectives.salt:Salt",
    "disback": "fastgen.objectives.disback:DisBack",
    "vdot": "fastgen.objectives.vdot:VDOT",
    "sid": "fastgen.objectives.sid:SiD",
    "sim": "fastgen.objectives.sim:SIM",
    "embedding_loss": "fastgen.objectives.embedding_loss:EmbeddingLoss",
    "gndm": "fastgen.objectives.gndm:GNDM",
    "rtdmd": "fastgen.objectives.rtdmd:RTDMD",
    "crd": "fastgen.objectives.crd:CRD",
    "tdm": "fastgen.objectives.tdm:TDM",
    "cdm": "fastgen.objectives.cdm:CDM",
    "phased_dmd": "fastgen.objectives.phased_dmd:PhasedDMD",
    "ode_regression": "fastgen.objectives.ode_regression:ODERegression",
    "flow_map": "fastgen.objectives.flow_map:FlowMap",
    "any_flow": "fastgen.objectives.any_flow:AnyFlow",
    "mean_flow": "fastgen.objectives.mean_flow:MeanFlow",
    "transition_matching": "fastgen.objectives.transition_matching:TransitionMatching",
    "pi_flow": "fastgen.objectives.pi_flow:PiFlow",
    "consistency": "fastgen.objectives.consistency:Consistency",
    "ctm": "fastgen.objectives.ctm:CTM",
    "scm": "fastgen.objectives.scm:SCM",
    "self_e": "fastgen.objectives.self_e:SelfE",
    "mdt": "fastgen.objectives.mdt:MDT",
    "reflow": "fastgen.objectives.reflow:Reflow",
    "progressive": "fastgen.objectives.progressive:Progressive",
    "gdd": "fastgen.objectives.gdd:GDD",
    "flash_dmd": "fastgen.objectives.flash_dmd:FlashDMD",
    "teacher_forcing": "fastgen.objectives.teacher_forcing:TeacherForcing",
}

REWARDS: dict[str, str] = {
    "linear": "fastgen.rewards.linear:Linear",
    "quadratic": "fastgen.rewards.quadratic:Quadratic",
    "ar1_motion": "fastgen.rewards.ar1_motion:AR1Motion",
    "digit_class": "fastgen.rewards.digit_class:DigitClass",
    "digit_stroke": "fastgen.rewards.digit_stroke:DigitStroke",
    "jpeg_size": "fastgen.rewards.jpeg_size:JpegSize",
    "clip_score": "fastgen.rewards.clip_score:ClipScore",
    "clip_contrast": "fastgen.rewards.clip_contrast:ClipContrast",
    "hpsv2": "fastgen.rewards.hpsv2:HPSv2",
    "pickscore": "fastgen.rewards.pickscore:Pickscore",
    "image_reward": "fastgen.rewards.image_reward:ImageReward",
    "aesthetic": "fastgen.rewards.aesthetic:Aesthetic",
    "hpsv3": "fastgen.rewards.hpsv3:HPSv3",
    "video_reward": "fastgen.rewards.video_reward:VideoReward",
    "motion": "fastgen.rewards.motion:Motion",
    "function": "fastgen.rewards.function:FunctionReward",
}

# Rewards with networks of their own. The recipe must give the paths of their files.
SCORERS = (
    "clip_score",
    "clip_contrast",
    "hpsv2",
    "pickscore",
    "image_reward",
    "aesthetic",
    "hpsv3",
    "video_reward",
    "motion",
)

METRICS: dict[str, str] = {
    "fid": "fastgen.metrics.fid:FID",
    "accuracy": "fastgen.metrics.accuracy:Accuracy",
    "mmd": "fastgen.metrics.mmd:MMD",
    "clip_retrieval": "fastgen.metrics.clip_retrieval:ClipRetrieval",
    "diversity": "fastgen.metrics.diversity:Diversity",
    "precision_recall": "fastgen.metrics.precision_recall:PrecisionRecall",
    "energy_distance": "fastgen.metrics.energy_distance:EnergyDistance",
    "mean_error": "fastgen.metrics.moments:MeanError",
    "cov_error": "fastgen.metrics.moments:CovError",
    "mode_share_error": "fastgen.metrics.mode_share:ModeShare",
    "video_accuracy": "fastgen.metrics.video_accuracy:VideoAccuracy",
    "motion_error": "fastgen.metrics.motion_error:MotionError",
    "drift": "fastgen.metrics.drift:Drift",
    "variance_error": "fastgen.metrics.frames:VarianceError",
    "lag_error": "fastgen.metrics.frames:LagError",
    "throughput": "fastgen.metrics.throughput:Throughput",
    "digit_class": "fastgen.metrics.reward:DigitClassMetric",
    "digit_stroke": "fastgen.metrics.reward:DigitStrokeMetric",
    "jpeg_size": "fastgen.metrics.reward:JpegSizeMetric",
    "clip_score": "fastgen.metrics.reward:ClipScoreMetric",
    "clip_contrast": "fastgen.metrics.reward:ClipContrastMetric",
    "hpsv2": "fastgen.metrics.reward:HPSv2Metric",
    "pickscore": "fastgen.metrics.reward:PickscoreMetric",
    "image_reward": "fastgen.metrics.reward:ImageRewardMetric",
    "aesthetic": "fastgen.metrics.reward:AestheticMetric",
    "hpsv3": "fastgen.metrics.reward:HPSv3Metric",
    "video_reward": "fastgen.metrics.reward:VideoRewardMetric",
    "motion": "fastgen.metrics.reward:MotionMetric",
}

# The sections that name a class, and the names that they may choose.
NAMED_SECTIONS: dict[str, Mapping[str, str]] = {"backbone": BACKBONES, "data": DATA, "objective": OBJECTIVES}

# The largest numbers of a recipe, far above any use. A mistyped 1e9 is refused, where it would fill the memory.
MOST_UPDATES = 1_000_000_000  # updates, which are made one after the other
MOST_SAMPLES = 10_000_000  # samples of a data set
MOST_BATCH = 1_000_000  # samples, or levels, in one tensor
MOST_WIDTH = 16_384  # of layers, and sides of pictures in pixels
MOST_STEPS = 10_000  # of what is repeated within an update: steps of a sampler, inner updates, draws
MOST_SEED = 1 << 62  # sample i has the seed `seed + i`, a signed 64-bit integer

# section -> {name of a key before version 0.2: its name now}
RENAMED = {
    "rollout": {
        "told_time": "conditioning_time",
        "next_time": "two_time",
        "told_guidance": "embedded_guidance",
    }
}


class RecipeError(ValueError):
    """A recipe that cannot be run. The message says which key is wrong, what is allowed and what to change."""


def shipped(path: str | Path) -> Path:
    """The location of a file or folder that ships with fastgen, such as `assets/teachers/digits` or a recipe. It is
    inside the installed package, where the wheel puts `assets` and `recipes`, or at the root of a checkout; `path` is
    relative to that place. The result need not exist."""
    root = PACKAGE if (PACKAGE / "assets").is_dir() else PACKAGE.parent
    return root / path


def here_or_shipped(path: str | Path) -> Path:
    """The path, if something is there, and else its place among the files that ship with fastgen."""
    return Path(path) if Path(path).exists() else shipped(path)


def check_name(section: str, value: Any, names: Mapping[str, str]) -> None:
    """Refuses a section without a name, or with one that is neither in its table nor an import path."""
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str):
        raise RecipeError(f"{section} must be a section with a name, one of {', '.join(names)}")
    if ":" not in name and name not in names:
        raise RecipeError(f"{section}.name: unknown name {name!r}{nearest(name, names)}")


def build_section(section: str, value: Any, names: Mapping[str, str], base: type) -> Any:
    """An instance of the class that `value["name"]` chooses, which must derive from `base`."""
    check_name(section, value, names)
    cls = resolve(section, value["name"], names, base)
    fields = {f.name for f in dataclasses.fields(cls)}
    values = dict(value) if "name" in fields else {k: v for k, v in value.items() if k != "name"}
    if ":" in value["name"] and "name" in fields:
        values.pop("name")
    check_keys(values, cls, f"{section}.", also=("name",))
    return validated(cls, values, f"{section}.")


def import_name(section: str, name: str) -> Any:
    """Imports the attribute named by `my_module:attribute`."""
    module, _, attribute = name.partition(":")
    try:
        return vars(importlib.import_module(module))[attribute]
    except (Exception, SystemExit) as error:  # the module's own code runs, and may raise anything
        raise RecipeError(
            f"{section}.name: cannot import {name!r}: {error!r}; write module:attribute, with a module that Python "
            "can import and an attribute that it has"
        ) from None


def imported(path: str) -> Any:
    """The attribute that an entry "module:attribute" of a table stands for."""
    module, _, attribute = path.partition(":")
    return vars(importlib.import_module(module))[attribute]


def resolve(section: str, name: str, names: Mapping[str, str], base: type) -> type:
    """The class that a name in a table stands for, or `my_module:MyClass` from the import path."""
    if ":" not in name:
        return imported(names[name])
    cls = import_name(section, name)
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls) and issubclass(cls, base)):
        raise RecipeError(f"{section}.name: {name!r} must be a pydantic dataclass that derives from {base.__name__}")
    return cls


def current_names(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A section that an earlier version stored, with its keys renamed to their present names."""
    renamed = RENAMED.get(section, {})
    return {renamed.get(key, key): value for key, value in values.items()}


def nearest(key: str, valid: typing.Iterable[str]) -> str:
    """The end of a message about a wrong key: '; did you mean ...', or the valid keys if none is close."""
    options = sorted(valid)
    close = difflib.get_close_matches(key, options, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(options)}"


def check_keys(values: Mapping[str, Any], cls: type, prefix: str, also: Sequence[str] = ()) -> None:
    """Refuses unknown keys in a section and in the sections inside it, and true or false in place of a number."""
    fields = {f.name for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields and key not in also:
            now = RENAMED.get(prefix.rstrip("."), {}).get(key)
            hint = f"; since version 0.2 it is called {now}" if now in fields else nearest(str(key), fields)
            raise RecipeError(f"unknown key {prefix}{key}{hint}")
    for name, hint in typing.get_type_hints(cls).items():
        value, section = values.get(name), section_class(hint)
        if isinstance(value, bool) and bool not in options(hint) and {int, float} & set(options(hint)):
            raise RecipeError(f"{prefix}{name}: a number is needed, got {str(value).lower()}")
        if section is not None and isinstance(value, dict):
            check_keys(value, section, f"{prefix}{name}.")
        elif typing.get_origin(hint) is dict and isinstance(value, dict):
            section = section_class(typing.get_args(hint)[1])
            for role, sub in value.items():
                if section is not None and isinstance(sub, dict):
                    check_keys(sub, section, f"{prefix}{name}.{role}.")


def section_class(hint: Any) -> type | None:
    """The dataclass X of a type hint X or X | None; None if there is no dataclass in the hint."""
    return next((o for o in options(hint) if isinstance(o, type) and dataclasses.is_dataclass(o)), None)


def options(hint: Any) -> tuple[Any, ...]:
    """The members of a union; any other hint by itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def validated(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    """pydantic's validation. The RecipeError has one line per error, each with the full path of its key."""
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        lines = []
        for e in error.errors():
            path = prefix + ".".join(str(p) for p in e["loc"] if not str(p).startswith(("tuple[", "function-")))
            message = e["msg"].removeprefix("Value error, ")
            shown = str(e["input"])[:80]
            given = "" if isinstance(e["input"], dict) or f"got {shown}" in message else f", got {shown!r}"
            lines.append(f"{path.rstrip('.')}: {message}{given}")
        raise RecipeError("\n".join(dict.fromkeys(lines))) from None


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to dotted keys."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {k: v for key, sub in value.items() for k, v in flatten(sub, f"{prefix}.{key}" if prefix else key).items()}
