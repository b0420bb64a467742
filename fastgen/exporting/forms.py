"""`fastgen export RUN --form FORM`: a student in the files that programs other than diffusers read.

    form              what is written                                       families
    lora              an adapter, in the keys that ComfyUI reads            sd and those below
    checkpoint        one file with UNet, VAE and text encoders             sd (1.5 and XL)
    diffusion_model   the network alone, in its authors' layout             sd3, flux, flux2, qwen_image, z_image, wan
    fp8               the same with matrices in float8 and a scale each     sd3, flux, flux2, qwen_image, z_image, wan
    gguf              the same as a GGUF file, matrices as Q8_0             sd3, flux, qwen_image

Beside the file lie the student's scheduler, a workflow for ComfyUI, and a README.md that says where the file goes
and how it is sampled. What a student cannot be written as is refused in words, before weights load
(`names.check_form`)."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file

import fastgen
from fastgen.backbones.saving import lora_files
from fastgen.config import load_stored
from fastgen.data.files import check_place, unused_sibling, write_json
from fastgen.exporting.files import of_tensors, write_file
from fastgen.exporting.ldm import checkpoint_entries
from fastgen.exporting.lora import lora_layers
from fastgen.exporting.names import check_form
from fastgen.exporting.quantized import GGUF_NAMES, float8_entries, write_gguf
from fastgen.exporting.reading import Student, read_student
from fastgen.exporting.steps import with_steps
from fastgen.exporting.transformers import original_entries
from fastgen.exporting.usage import write_usage
from fastgen.run.export import export_run
from fastgen.sampling.sampler import METADATA, read_metadata

MARK = "form.json"  # says that a folder was written here, so that it may be replaced


def export_form(
    source: Path, form: str, output: Path | None = None, merge: bool = False, steps: Sequence[int] = ()
) -> Path:
    """Writes the student of a run's last checkpoint, or of an export, in another form. The adapter of a LoRA run is
    added into the weights, except for the form lora. The folder takes its place when it is complete. merge: as in
    `export_run`, which no form needs and the form lora contradicts. steps: other numbers of steps, each of which gets
    a folder with its scheduler and its workflow.

    Raises ValueError if `source` is neither a run nor an export, if its student has no such form, or if `output`
    exists and was not written here."""
    if not (source / "recipe.yaml").is_file():
        raise ValueError(f"{source} is neither a run nor an export folder: it has no recipe.yaml")
    recipe, exported = load_stored(source / "recipe.yaml"), (source / METADATA).is_file()
    adapter = bool(read_metadata(source).get("lora")) if exported else "student" in recipe.lora
    check_form(form, recipe, adapter)
    if merge and form == "lora":
        raise ValueError("a merged student has no adapter left for the form lora; leave out --merge")
    others = [with_steps(recipe, n) for n in steps]
    if exported and adapter and form != "lora":
        raise ValueError(f"{source} is an adapter, and the form {form} needs the whole network; give the run folder")
    folder = output or source / f"export_{form}"
    if folder.exists() and not (folder / MARK).is_file():
        raise ValueError(f"{folder} exists and holds no student in another form; choose another folder")
    check_place(folder)
    partial, whole = unused_sibling(folder, "partial"), unused_sibling(folder, "whole")
    try:
        student = read_student(source if exported else export_run(source, whole, merge=form != "lora"))
        files = write_form(student, form, partial, recipe.output_dir.name)
        for policy in others:
            write_steps(dataclasses.replace(student, policy=policy), form, files, partial)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(whole, ignore_errors=True)
    return folder


def write_form(student: Student, form: str, folder: Path, name: str) -> list[str]:
    """Writes an export in another form into a new folder, and returns the names of its files, one for each network.
    name: how they begin."""
    kind = "gguf" if form == "gguf" else "safetensors"
    noise = ("",) if len(student.parts) == 1 else ("_high_noise", "_low_noise")
    files = [f"{name}_{form}{end}.{kind}" for end in noise]
    folder.mkdir(parents=True)
    for i, (part, file) in enumerate(zip(student.parts, files, strict=True)):
        path = folder / file
        if form == "lora":
            layers = load_file(student.folder / lora_files(student.parts)[i])
            write_file(path, of_tensors(lora_layers(layers, student.networks[i])))
        elif form == "checkpoint":
            write_file(path, checkpoint_entries(student.folder))
        elif form == "fp8":
            write_file(path, *float8_entries(original_entries(student.folder / part)))
        elif form == "gguf":
            entries = list(original_entries(student.folder / part))
            write_gguf(path, entries, GGUF_NAMES[student.networks[i]["_class_name"]])
        else:
            write_file(path, original_entries(student.folder / part))
    shutil.copytree(student.folder / "scheduler", folder / "scheduler")
    write_usage(student, form, files, folder)
    write_json(folder / MARK, {"form": form, "fastgen": fastgen.__version__, "files": files})
    return files


def write_steps(student: Student, form: str, files: Sequence[str], folder: Path) -> None:
    """Scheduler, workflow and README.md of the same files for the student's number of steps, in a folder inside."""
    own = folder / f"{student.policy.num_steps}_steps"
    student.backbone.student_scheduler(student.policy).save_pretrained(own / "scheduler")
    write_usage(student, form, files, own, weights="path/to/this/folder/..")
