"""Folded attention is exact: one biased token stands for a whole run of identical ones."""

import math

import pytest
import torch
from diffusers import SD3Transformer2DModel

from fastgen.backbones.sd3_attention import FoldedJointAttnProcessor, fold_repeats


def tiny_transformer(**changes) -> SD3Transformer2DModel:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        pos_embed_max_size=8,
        **changes,
    ).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.15)
    return model


def padded_context(rows: int = 3, words: int = 5, padding: int = 251) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    content = torch.randn(rows, words, 24, generator=generator)
    return torch.cat([content, torch.randn(rows, 1, 24, generator=generator).expand(-1, padding, -1)], dim=1)


@pytest.mark.parametrize(
    "changes",
    [{}, {"qk_norm": "rms_norm"}, {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}],
    ids=["sd3", "qk_norm", "sd3.5"],
)
@torch.no_grad()
def test_folded_forward_equals_the_stock_one(changes):
    model, context = tiny_transformer(**changes), padded_context()
    latents, pooled, timestep = torch.randn(3, 4, 8, 8), torch.randn(3, 20), torch.tensor([900.0, 400.0, 30.0])
    stock = model(latents, context, pooled, timestep).sample
    without_padding = model(latents, context[:, :6], pooled, timestep).sample

    model.set_attn_processor(FoldedJointAttnProcessor())
    assert torch.allclose(model(latents, context, pooled, timestep).sample, stock, atol=1e-5)
    folded, log_repeats = fold_repeats(context)
    assert folded.shape == (3, 6, 24)
    again = model(
        latents, folded, pooled, timestep, joint_attention_kwargs={"context_log_repeats": log_repeats}
    ).sample
    assert torch.allclose(again, stock, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(without_padding, stock, atol=1e-3), "the padding must matter for this test to mean much"


def test_fold_keeps_the_longest_run_all_rows_share():
    context = padded_context(rows=2, words=4, padding=6)
    context[1, 5] += 1
    folded, log_repeats = fold_repeats(context)
    assert torch.equal(folded, context[:, :7])
    assert log_repeats[:, :-1].abs().max() == 0
    assert log_repeats[:, -1].tolist() == pytest.approx([math.log(4)] * 2)


def test_fold_leaves_contexts_without_repeats_alone():
    context = torch.randn(2, 7, 24)
    folded, log_repeats = fold_repeats(context)
    assert torch.equal(folded, context)
    assert torch.equal(log_repeats, torch.zeros(2, 7))
