"""How an exported student is loaded and called, in Markdown for its model card."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

from fastgen.backbones import comfyui
from fastgen.backbones.folder import FLOW_MAP, STREAMING
from fastgen.backbones.saving import lora_files
from fastgen.pipelines import few_step, flow_map, inner_flow, segment_flow
from fastgen.rollout import RolloutPolicy

CALL = """```python
import torch
from diffusers import DiffusionPipeline

{load}
{call}
```

The step list is stored in the scheduler: `num_inference_steps={num_steps}` gives the noise levels the student was
trained at, {timesteps}. It was not trained for other numbers of steps, nor for a guidance scale above 1. With
`transition: renoise`, `cps` or `tcd`, every step adds fresh noise, which depends on the seed above."""

OWN_PARTS = """

This student needs fastgen installed, and the import above. diffusers has no class for its {parts}. It finds a class of
another package only if that package has been imported, and only for a local folder. If the student is on the hub,
download the folder first with `huggingface_hub.snapshot_download`."""

INPUTS = """

Its network takes inputs besides the timestep, which plain diffusers cannot give it. Sample it with fastgen's class
above, from a local folder."""

STREAM = """```python
from diffusers.utils import export_to_video
from fastgen.pipelines.streaming import {streaming}{import}

pipeline = {streaming}.from_pretrained("path/to/this/folder"){read}
video = pipeline("a prompt", seed=0{given}).frames[0]
export_to_video(video, "video.mp4", fps=pipeline.trained("fps"))

stream = pipeline.stream("a prompt", seed=0{given})  # the same video, {length}
pictures = next(stream)  # those of the first chunk, [n, 3, H, W] in [0, 1]
stream.prompt = "another prompt"  # from the next chunk on
```

The student makes a video chunk by chunk, each in {num_steps} steps given the frames before it. What a chunk is, which
frames it sees, and the noise levels, {timesteps}, are stored in the folder. It was not trained for other windows, for
other numbers of steps, or for a guidance scale above 1.

It needs fastgen installed: diffusers has no class for it, and with the stock class every frame would see the frames
after it."""

DRIVEN = {  # in place of marks in STREAM, for a student whose videos are driven by a sound
    "{import}": "\nfrom safetensors.torch import load_file",
    "{read}": '\nsound = load_file("a.sound.safetensors")["sound"]  # [moments, bins], of the first picture on',
    "{given}": ", sound=sound",
    "{length}": "as long as its sound",
}
UNDRIVEN = {"{import}": "", "{read}": "", "{given}": "", "{length}": "without end"}

COMFYUI = """

In ComfyUI, sample it with the sampler `{sampler}`, the sigmas `{sigmas}` (node `ManualSigmas`) and cfg 1.
`fastgen export RUN --form ...` writes the file that ComfyUI reads, and a workflow."""

STEP_COUNTS = """

It was also trained for other numbers of steps on the same grid: `num_inference_steps` may be {counts}."""

ANY_STEP = """ It is a flow map, so that other numbers of steps work as well, on the same grid."""


def pipeline_usage(backbone: Any, policy: RolloutPolicy, folder: Path, adapter: bool) -> str:
    """For a `PipelineBackbone`'s export in `folder`. adapter: whether it is a LoRA adapter, not a whole pipeline."""
    load, call, own = loading(backbone, policy, adapter), CALL.replace("{call}", backbone.call), own_components(folder)
    if policy.chunks is not None:
        call = STREAM
    elif own and not policy.inputs:
        load = "\n".join(f"import {module}" for module in sorted(set(own.values()))) + f"\n\n{load}"
        call += OWN_PARTS.replace("{parts}", " and its ".join(own))
    if policy.inputs:
        call += INPUTS + (ANY_STEP if policy.any_step else "")
    elif stock_network(policy) and backbone.config.name in comfyui.FAMILIES:
        call += comfyui_settings(backbone, policy)
    if policy.step_counts:
        call += STEP_COUNTS
    filled = {
        **(DRIVEN if "sound" in backbone.config.given else UNDRIVEN),
        "{load}": load,
        "{counts}": ", ".join(map(str, policy.step_counts)),
        "{streaming}": STREAMING + backbone.components["_class_name"],
        "{num_steps}": str(policy.num_steps),
        "{eta}": f", eta={policy.eta:g}" if policy.transition == "tcd" else "",
        "{timesteps}": str([round(t, 6) for t in policy.timesteps]),
    }
    for mark, text in filled.items():
        call = call.replace(mark, text)
    return call


def stock_network(policy: RolloutPolicy) -> bool:
    """Whether a student with this policy, and without added inputs, has a network of a stock class."""
    return policy.chunks is None and policy.inner is None and policy.segment is None


def plain_call(backbone: Any, policy: RolloutPolicy, adapter: bool) -> str:
    """For the first line of a model card. The stock pipelines read no number of steps and no guidance scale from a
    folder, so that `pipeline("a prompt")` uses its own, whatever the student needs. (An exported FLUX.2 klein says
    that it is distilled, which its pipeline reads.)"""
    if policy.chunks is not None:  # fastgen's own pipeline, which reads its defaults from the folder
        return ""
    (steps, scale), told = backbone.stock_call, backbone.guidance_told("student")
    marked = backbone.components["_class_name"] == "Flux2KleinPipeline" and not adapter
    others = [] if steps == policy.num_steps else [f"{steps} steps instead of {policy.num_steps}"]
    own = inspect.signature(backbone.pipeline_class.__call__).parameters.get("guidance_scale")
    wanted = re.search(r"\bguidance_scale=([\d.]+)", backbone.call)  # as the card calls it
    matters = told is not None or (scale != 1 and not marked)
    if matters and own and wanted and own.default not in (None, float(wanted[1])):
        others.append(f"guidance scale {own.default:g} instead of {wanted[1]}")
    if not others:
        return ""
    return f'**`pipeline("a prompt")` alone would use {" and ".join(others)}.** Call it as shown below.'


def comfyui_settings(backbone: Any, policy: RolloutPolicy) -> str:
    try:
        sampling = comfyui.comfyui_sampling(backbone, policy)
    except ValueError as refusal:
        return f"\n\nComfyUI cannot sample it: {refusal}."
    return COMFYUI.replace("{sampler}", sampling.sampler).replace("{sigmas}", sampling.text)


def own_components(folder: Path) -> dict[str, str]:
    """The components of an exported pipeline whose class is fastgen's own, each with its module."""
    index = folder / "model_index.json"
    components = json.loads(index.read_text()).items() if index.is_file() else ()
    modules = (few_step.__name__, inner_flow.__name__, segment_flow.__name__)
    return {name: entry[0] for name, entry in components if isinstance(entry, list) and entry[0] in modules}


def loading(backbone: Any, policy: RolloutPolicy, adapter: bool) -> str:
    """The lines that load the export: a pipeline of our own class, a whole stock pipeline, or an adapter for the
    original one."""
    if policy.inputs:
        name = FLOW_MAP + backbone.components["_class_name"]
        return f'from {flow_map.__name__} import {name}\n\npipeline = {name}.from_pretrained("path/to/this/folder")'
    if not adapter:
        return 'pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder")'
    scheduler = type(backbone.student_scheduler(policy))
    kind, module = scheduler.__name__, scheduler.__module__
    lines = [
        f"from {'diffusers' if module.startswith('diffusers.') else module} import {kind}\n",
        f"pipeline = {backbone.loader}.from_pretrained({json.dumps(backbone.config.path)})",
    ]
    if backbone.loader != "DiffusionPipeline":
        lines.insert(0, f"from diffusers import {backbone.loader}")
    for i, file in enumerate(lora_files(backbone.subfolders)):
        more = f', load_into_transformer_2=True, adapter_name="few_step_{i + 1}"' if i else ""
        lines.append(f'pipeline.load_lora_weights("path/to/this/folder", weight_name="{file}"{more})')
    lines.append(f'pipeline.scheduler = {kind}.from_pretrained("path/to/this/folder", subfolder="scheduler")')
    return "\n".join(lines)
