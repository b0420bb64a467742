"""A workflow for ComfyUI, in its API format: node id -> class_type and inputs, a link being [node id, output].

One graph for all families: loaders, prompts, an empty latent, then RandomNoise, CFGGuider with cfg 1, the sampler and
ManualSigmas, one SamplerCustomAdvanced for each network, and the decoder. What the user has to have besides the
student's file (text encoders, VAE, and for an adapter the original network) is named as in Comfy-Org's
repositories."""

import itertools
from collections.abc import Sequence
from typing import Any

from fastgen.backbones.comfyui import Sampling, comfyui_sampling
from fastgen.exporting.reading import Student

Link = list[Any]
Nodes = dict[str, dict[str, Any]]
BASES = {  # what an adapter is put on; names that ComfyUI's examples use
    "sd": "the original checkpoint.safetensors",
    "sd3": "the original diffusion model.safetensors",
    "flux": "flux1-dev.safetensors",
    "qwen_image": "qwen_image_bf16.safetensors",
    "flux2": "flux2-dev.safetensors",
    "z_image": "z_image_bf16.safetensors",
    "wan": "the original diffusion model.safetensors",
}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {  # family -> node and inputs
    "sd3": (
        "TripleCLIPLoader",
        {
            "clip_name1": "clip_l.safetensors",
            "clip_name2": "clip_g.safetensors",
            "clip_name3": "t5xxl_fp16.safetensors",
        },
    ),
    "flux": (
        "DualCLIPLoader",
        {"clip_name1": "clip_l.safetensors", "clip_name2": "t5xxl_fp16.safetensors", "type": "flux"},
    ),
    "qwen_image": ("CLIPLoader", {"clip_name": "qwen_2.5_vl_7b.safetensors", "type": "qwen_image"}),
    "flux2": ("CLIPLoader", {"clip_name": "mistral_3_small_flux2_bf16.safetensors", "type": "flux2"}),
    "z_image": ("CLIPLoader", {"clip_name": "qwen_3_4b.safetensors", "type": "lumina2"}),
    "wan": ("CLIPLoader", {"clip_name": "umt5_xxl_fp16.safetensors", "type": "wan"}),
}
VAES = {
    "sd3": "sd3_vae.safetensors",
    "flux": "ae.safetensors",
    "flux2": "flux2-vae.safetensors",
    "qwen_image": "qwen_image_vae.safetensors",
    "z_image": "ae.safetensors",
}
KLEIN = {7680: "4b", 12288: "8b"}  # width of FLUX.2 klein's prompts -> its Qwen3
PIPELINES = (  # that the graph below is for
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "Flux2Pipeline",
    "Flux2KleinPipeline",
    "ZImagePipeline",
    "QwenImagePipeline",
    "WanPipeline",
)
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v_prediction", "sample": "x0"}  # ModelSamplingDiscrete's names
DEEP = 48  # latent channels of Wan 2.2's own VAE, whose latents have a node of their own


class Graph:
    """Nodes that are numbered as they come."""

    def __init__(self) -> None:
        self.nodes: Nodes = {}

    def add(self, kind: str, **inputs: Any) -> Link:
        """Adds a node and returns the link to its first output."""
        number = str(len(self.nodes) + 1)
        self.nodes[number] = {"class_type": kind, "inputs": inputs}
        return [number, 0]


def workflow(student: Student, form: str, files: Sequence[str]) -> Nodes:
    """files: the student's, one for each network. Raises ValueError, in words, if ComfyUI has no sampler for it."""
    if (kind := student.backbone.components["_class_name"]) not in PIPELINES:
        raise ValueError(f"no graph is known for a {kind}")
    sampling, graph = comfyui_sampling(student.backbone, student.policy), Graph()
    family = student.backbone.config.name
    models, clip, vae = add_loaders(graph, student, form, files)
    positive = graph.add("CLIPTextEncode", clip=clip, text="a prompt")
    negative = graph.add("CLIPTextEncode", clip=clip, text="")  # has no effect at cfg 1
    told = student.backbone.guidance_told("student")
    if told is not None:
        positive = graph.add("FluxGuidance", conditioning=positive, guidance=told)
    latent = add_latent(graph, student, vae)
    for model, levels, first in stages(models, sampling, student):
        noise = graph.add("RandomNoise", noise_seed=0) if first else graph.add("DisableNoise")
        latent = graph.add(
            "SamplerCustomAdvanced",
            noise=noise,
            guider=graph.add("CFGGuider", model=model, positive=positive, negative=negative, cfg=1.0),
            sampler=graph.add("KSamplerSelect", sampler_name=sampling.sampler),
            sigmas=graph.add("ManualSigmas", sigmas=Sampling(sampling.sampler, levels).text),
            latent_image=latent,
        )
    pictures = graph.add("VAEDecode", samples=latent, vae=vae)
    if family == "wan":
        video = graph.add("CreateVideo", images=pictures, fps=float(student.backbone.fps))
        graph.add("SaveVideo", video=video, filename_prefix="fastgen", format="auto", codec="auto")
    else:
        graph.add("SaveImage", images=pictures, filename_prefix="fastgen")
    return graph.nodes


def add_loaders(graph: Graph, student: Student, form: str, files: Sequence[str]) -> tuple[list[Link], Link, Link]:
    """The links to the models, one for each file, to the text encoders and to the VAE."""
    family = student.backbone.config.name
    if family == "sd":
        number = graph.add("CheckpointLoaderSimple", ckpt_name=base_name(student) if form == "lora" else files[0])[0]
        models, clip, vae = [[number, 0]], [number, 1], [number, 2]
    else:
        names = [base_name(student)] * len(files) if form == "lora" else files
        if form == "gguf":
            models = [graph.add("UnetLoaderGGUF", unet_name=name) for name in names]
        else:
            models = [graph.add("UNETLoader", unet_name=name, weight_dtype="default") for name in names]
        node, inputs = ENCODERS[family]
        if student.backbone.components["_class_name"] == "Flux2KleinPipeline":
            qwen = KLEIN.get(student.networks[0]["joint_attention_dim"], "4b")
            inputs = inputs | {"clip_name": f"qwen_3_{qwen}.safetensors"}
        clip = graph.add(node, **inputs)
        vae = graph.add("VAELoader", vae_name=VAES.get(family) or wan_vae(student))
    if form == "lora":
        models = [
            graph.add("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=1.0)
            for model, name in zip(models, files, strict=True)
        ]
    if family == "sd" and (kind := student.backbone.scheduler().config.prediction_type) != "epsilon":
        models = [graph.add("ModelSamplingDiscrete", model=m, sampling=PREDICTIONS[kind], zsnr=False) for m in models]
    return models, clip, vae


def base_name(student: Student) -> str:
    """The file that an adapter is put on."""
    family, told = student.backbone.config.name, student.backbone.guidance_told("student")
    untold = {"flux": "flux1-schnell.safetensors", "flux2": "flux-2-klein-base-4b.safetensors"}
    return untold[family] if told is None and family in untold else BASES[family]


def wan_vae(student: Student) -> str:
    return "wan2.2_vae.safetensors" if student.backbone.latent_shape[1] == DEEP else "wan_2.1_vae.safetensors"


def add_latent(graph: Graph, student: Student, vae: Link) -> Link:
    backbone = student.backbone
    family = backbone.config.name
    if family == "wan":
        config = backbone.config
        size = {"width": config.width, "height": config.height, "length": config.num_frames, "batch_size": 1}
        if backbone.latent_shape[1] == DEEP:
            return graph.add("Wan22ImageToVideoLatent", vae=vae, **size)
        return graph.add("EmptyHunyuanLatentVideo", **size)
    node = {"sd": "EmptyLatentImage", "flux2": "EmptyFlux2LatentImage"}.get(family, "EmptySD3LatentImage")
    return graph.add(node, width=backbone.image_size, height=backbone.image_size, batch_size=1)


def stages(models: Sequence[Link], sampling: Sampling, student: Student) -> list[tuple[Link, tuple[float, ...], bool]]:
    """(model, its sigmas with the one where it ends, whether it is the first), without models that make no step."""
    if student.boundary is None:
        return [(models[0], sampling.sigmas, True)]
    high = sum(t >= student.boundary for t in student.policy.timesteps)
    ends = [0, high, student.policy.num_steps]
    parts = [
        (model, sampling.sigmas[start : end + 1], start == 0)
        for model, (start, end) in zip(models, itertools.pairwise(ends), strict=True)
    ]
    return [part for part in parts if len(part[1]) > 1]
