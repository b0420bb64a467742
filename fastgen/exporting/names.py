"""Which form a student of which family can be written in, and why not in the others."""

from fastgen.backbones.pipeline_config import PipelineConfig
from fastgen.exporting.quantized import check_gguf
from fastgen.recipe import Recipe

TRANSFORMERS = ("sd3", "flux", "flux2", "qwen_image", "z_image", "wan")
FAMILIES: dict[str, tuple[str, ...]] = {  # form -> the backbones that have it
    "lora": ("sd", *TRANSFORMERS),
    "checkpoint": ("sd",),
    "diffusion_model": TRANSFORMERS,
    "fp8": TRANSFORMERS,
    "gguf": ("sd3", "flux", "qwen_image"),
}
OTHERWISE = {  # (form, backbone) -> why it has not, and what to do
    ("checkpoint", ""): "its network goes into a file of its own, without encoders and VAE: --form diffusion_model",
    ("diffusion_model", "sd"): "its readers want UNet, VAE and text encoders in one file: --form checkpoint",
    ("fp8", "sd"): "its UNet is small; write it in half precision instead: --form checkpoint",
    ("gguf", "sd"): "its UNet consists of convolutions, which GGUF does not make smaller: --form checkpoint",
    ("gguf", "wan"): "GGUF tensors have at most 4 dimensions, and Wan's patch embedding has 5: --form fp8",
    ("gguf", "flux2"): "no name is known by which readers of GGUF files take it: --form fp8",
    ("gguf", "z_image"): "no name is known by which readers of GGUF files take it: --form fp8",
    ("", "cogvideox"): "fastgen does not write its layout of ComfyUI; plain diffusers reads the ordinary export",
    ("", "dit"): "other readers need prompts, and it has classes; plain diffusers reads the ordinary export",
    ("", "unet2d"): "other readers need prompts, and it has none; plain diffusers reads the ordinary export",
    ("", "hunyuan_video15"): "fastgen does not write its layout of ComfyUI; plain diffusers reads the ordinary export",
    ("", "ltx"): "fastgen does not write its layout of ComfyUI; plain diffusers reads the ordinary export",
    ("", "ltx2"): "fastgen does not write its layout of ComfyUI; plain diffusers reads the ordinary export",
    ("", "sana"): "ComfyUI has no network of Sana; plain diffusers reads the ordinary export",
    ("", "sana_sprint"): "ComfyUI has no network of Sana; plain diffusers reads the ordinary export",
    ("", "pixart_sigma"): "fastgen does not write its layout of ComfyUI; plain diffusers reads the ordinary export",
    **{
        (
            "",
            name,
        ): "its workflow would need the picture that a sample is made from, which fastgen does not write; plain "
        "diffusers reads the ordinary export"
        for name in ("wan_i2v", "wan_vace", "qwen_image_edit")
    },
}


def check_form(form: str, recipe: Recipe, adapter: bool) -> None:
    """Raises ValueError, in words, if this recipe's student cannot be written in this form. adapter: whether it is an
    adapter. Loads no weights."""
    backbone, policy = recipe.backbone, recipe.rollout
    if not isinstance(backbone, PipelineConfig):
        raise ValueError(f"a student of the backbone {backbone.name} is no diffusers pipeline, and has no --form")
    if policy.chunks is not None:
        raise ValueError("a student that makes videos chunk by chunk is sampled by fastgen alone; leave out --form")
    if policy.inner is not None:
        raise ValueError(
            "the last blocks of this student's network run several times in each step, which no other program does; "
            "leave out --form"
        )
    if policy.segment is not None:
        raise ValueError(
            "this student's network predicts a flow for whole segments, which no other program follows; leave out "
            "--form"
        )
    if policy.inputs:
        raise ValueError(
            f"this student's network takes {' and '.join(policy.inputs)} besides the noise level, which no other "
            "program can give it; leave out --form"
        )
    if backbone.name not in FAMILIES[form]:
        keys = ((form, backbone.name), ("", backbone.name), (form, ""))
        why = next((OTHERWISE[key] for key in keys if key in OTHERWISE), "no program is known to read it")
        raise ValueError(f"backbone {backbone.name} has no form {form}: {why}")
    if form == "lora" and not adapter:
        raise ValueError(
            "this student is no adapter: its recipe has no lora.student, or it was merged; give another form"
        )
    if form == "gguf":
        check_gguf()
