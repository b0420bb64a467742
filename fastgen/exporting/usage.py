"""The README.md beside a student in another program's form: where its file goes, and how it is sampled there."""

import json
from collections.abc import Sequence
from pathlib import Path

from fastgen.backbones.comfyui import comfyui_sampling
from fastgen.data.files import write_json
from fastgen.exporting.comfyui import base_name, workflow
from fastgen.exporting.reading import Student

FOLDERS = {"lora": "loras", "checkpoint": "checkpoints", "gguf": "unet"}  # of ComfyUI; else diffusion_models
WORKFLOW = "workflow.json"
PAGE = """# A {num_steps}-step student of {source}, as {files}

{comfyui}

## diffusers

{diffusers}
"""
COMFYUI = """## ComfyUI

Put {files} into `models/{folder}`{extension}.
`{workflow}`, in API format, samples it (Workflow > Open in ComfyUI).{parts}{base}
In a workflow of your own, use these settings, and no others:

| setting | value |
|---|---|
| sampler | `{sampler}` |
| sigmas (node `ManualSigmas`) | `{sigmas}` |
| cfg | 1 |
{more}
No word in the prompt triggers the student."""
PARTS = " Text encoders and VAE have the names of ComfyUI's examples there; put those of yours."
CODE = """```python
import torch
from diffusers import DiffusionPipeline, {names}

{load}
pipeline.scheduler = {scheduler}.from_pretrained("path/to/this/folder", subfolder="scheduler")
{call}
```"""


def write_usage(
    student: Student, form: str, files: Sequence[str], folder: Path, weights: str = "path/to/this/folder"
) -> None:
    """Writes README.md, and the workflow if ComfyUI can sample the student. weights: the folder of the files, as the
    page calls it."""
    named = " and ".join(f"`{name}`" for name in files)
    try:
        write_json(folder / WORKFLOW, workflow(student, form, files))
        comfyui = comfyui_text(student, form, named)
    except ValueError as refusal:
        comfyui = f"## ComfyUI\n\nThere is no workflow for ComfyUI: {refusal}."
    page = PAGE.format(
        num_steps=student.policy.num_steps,
        source=student.backbone.config.path,
        files=named,
        comfyui=comfyui,
        diffusers=diffusers_text(student, form, files, weights),
    )
    (folder / "README.md").write_text(page)


def comfyui_text(student: Student, form: str, named: str) -> str:
    sampling = comfyui_sampling(student.backbone, student.policy)
    told = student.backbone.guidance_told("student")
    more = f"| guidance (node `FluxGuidance`) | {told:g} |\n" if told is not None else ""
    if student.boundary is not None:
        more += f"| the second network takes over | below sigma {student.boundary:g} |\n"
    base = (
        f" The adapter is for {student.backbone.config.path}; in the workflow, put the name of its file in place of "
    )
    return COMFYUI.format(
        files=named,
        folder=FOLDERS.get(form, "diffusion_models"),
        extension=" (with the extension ComfyUI-GGUF)" if form == "gguf" else "",
        workflow=WORKFLOW,
        parts="" if student.backbone.config.name == "sd" else PARTS,
        base=f"{base}`{base_name(student)}`." if form == "lora" else "",
        sampler=sampling.sampler,
        sigmas=sampling.text,
        more=more,
    )


def diffusers_text(student: Student, form: str, files: Sequence[str], weights: str) -> str:
    """The lines that load the form in diffusers and sample it."""
    if form == "fp8":
        return "diffusers does not read the scales of such a file, and would compute with wrong weights."
    backbone = student.backbone
    scheduler, base = type(backbone.student_scheduler(student.policy)).__name__, json.dumps(backbone.config.path)
    pipeline, network, more = backbone.components["_class_name"], backbone.network_class, ""
    if form == "lora":
        names = scheduler
        load = [f"pipeline = DiffusionPipeline.from_pretrained({base})"]
        for i, name in enumerate(files):
            where = f', load_into_transformer_2=True, adapter_name="few_step_{i + 1}"' if i else ""
            load.append(f'pipeline.load_lora_weights("{weights}", weight_name="{name}"{where})')
    elif form == "checkpoint":
        names = f"{scheduler}, {pipeline}"
        load = [f'pipeline = {pipeline}.from_single_file("{weights}/{files[0]}", config={base})']
    else:
        names = f"{scheduler}, {network}"
        if form == "gguf":
            names += ", GGUFQuantizationConfig"
            more = ", quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16)"
        load = []
        for part, name in zip(student.parts, files, strict=True):
            where = f'"{weights}/{name}", config={base}, subfolder="{part}"{more}'
            load.append(f"{part} = {network}.from_single_file({where})")
        given = ", ".join(f"{part}={part}" for part in student.parts)
        load.append(f"pipeline = DiffusionPipeline.from_pretrained({base}, {given})")
    call = backbone.call.replace("{num_steps}", str(student.policy.num_steps))
    call = call.replace("{eta}", f", eta={student.policy.eta:g}" if student.policy.transition == "tcd" else "")
    return CODE.format(names=names, load="\n".join(load), scheduler=scheduler, call=call)
