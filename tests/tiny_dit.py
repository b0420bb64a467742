"""A complete DiTPipeline folder of real diffusers classes at random, tiny sizes, made without the network."""

import json
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from tiny_pipelines import tiny_vae

LABELS = {"0": "tench, Tinca tinca", "1": "goldfish, Carassius auratus", "207": "golden retriever"}


def tiny_dit(folder: Path, seed: int = 0) -> Path:
    """Writes the folder and returns it; images of 32 x 32 pixels make latents of [4, 16, 16]."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = DiTPipeline(
            transformer=dit_transformer(),
            vae=tiny_vae(scaling_factor=0.18215),
            scheduler=DDIMScheduler(clip_sample=False),  # as the published pipelines have it
        )
    pipeline.save_pretrained(folder)
    path = (
        folder / "model_index.json"
    )  # which names the labels, and the network by its old class, as the published one
    index = json.loads(path.read_text())
    index |= {"id2label": LABELS, "transformer": ["diffusers", "Transformer2DModel"]}
    path.write_text(json.dumps(index))
    return folder


def dit_transformer() -> DiTTransformer2DModel:
    """Its output is made as large as noise, and its class matters."""
    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, out_channels=8, num_layers=4, sample_size=16
    ).eval()
    with torch.no_grad():
        network.proj_out_2.weight.mul_(3)
        for block in network.transformer_blocks:
            block.norm1.linear.weight.mul_(3)
    return network
