"""The autoencoder of the moving digits teacher: a small AutoencoderKLWan and its training."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanResidualBlock,
    patchify,
    unpatchify,
)
from torch import Tensor, nn
from training import optimizers, train

from fastgen import noise
from fastgen.data.digits import load_classifier
from fastgen.data.moving_digits import draw_scenes, placement, places, render

CHANNELS = 32
PATCH = 2
PIXELS = 144 * 24 * 24  # in a batch
JUDGED = 4  # pictures a clip whose features are compared
KL_WEIGHT = 2e-5
FEATURE_WEIGHT = 0.003


def new_vae() -> AutoencoderKLWan:
    """An untrained autoencoder, 8 x in space and 4 x in time. Residual branches begin at zero and no convolution sees
    an earlier picture, so that it begins as an autoencoder of single pictures."""
    vae = AutoencoderKLWan(
        base_dim=16,
        dim_mult=[1, 2, 3],
        num_res_blocks=1,
        z_dim=CHANNELS,
        temperal_downsample=[True, True],
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        patch_size=PATCH,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
        elif isinstance(module, WanAttentionBlock):
            nn.init.zeros_(module.proj.weight)
            nn.init.zeros_(module.proj.bias)
        elif isinstance(module, WanCausalConv3d) and module.kernel_size[0] == 3 and module.stride[0] == 1:
            nn.init.zeros_(module.weight[:, :, :2])
    nn.init.constant_(vae.quant_conv.bias[CHANNELS:], -6.0)  # begins with little noise in the latents
    return vae


def encode(vae: AutoencoderKLWan, video: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance of the latents of video [B, 3, F, H, W] in [-1, 1], as vae.encode computes them.

    The pictures after the first go through the encoder at once; its feature cache gives the same numbers in fewer
    calls."""
    memory = [None] * vae._cached_conv_counts["encoder"]
    parts = [part for part in patchify(video, PATCH).tensor_split([1], dim=2) if part.shape[2]]
    coded = [vae.encoder(part, feat_cache=memory, feat_idx=[0]) for part in parts]
    mean, log_variance = vae.quant_conv(torch.cat(coded, 2)).chunk(2, 1)
    return mean, log_variance.clamp(-30, 20)


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """vae.decode without its clamp, which has no gradient where a black pixel comes out below -1."""
    memory = [None] * vae._cached_conv_counts["decoder"]
    parts = [part for part in vae.post_quant_conv(latents).tensor_split([1], dim=2) if part.shape[2]]
    decoded = [
        vae.decoder(part, feat_cache=memory, feat_idx=[0], first_chunk=number == 0)
        for number, part in enumerate(parts)
    ]
    return unpatchify(torch.cat(decoded, 2), PATCH)


def shape_at(share: float) -> tuple[int, int]:
    """(pictures, canvas) of a batch after this share of the training: short clips on a small canvas first, and in the
    end clips longer than those of the teacher. Drawn from the global generator."""
    draw = float(torch.rand(()))
    if share < 0.1:
        return (1 if draw < 0.5 else 5), 24
    if share < 0.45:
        return (1 if draw < 0.15 else 9), 24
    if share < 0.75:
        return (5 if draw < 0.2 else 17), 24
    return (9 if draw < 0.2 else 33), (32 if draw > 0.5 else 24)


def train_vae(folder: Path, work: Path, seed: int, steps: int) -> None:
    """Train the autoencoder and write it, with mean and deviation of its latents in its config."""
    torch.manual_seed(seed)
    vae, classifier = new_vae(), load_classifier()
    key = noise.make_key(seed, "moving digits autoencoder")

    def losses(step: int, steps: int) -> dict[str, Tensor]:
        frames, canvas = shape_at(step / steps)
        count = max(2, PIXELS // (frames * canvas**2)) if frames > 1 else 64
        scenes = draw_scenes(torch.arange(count) + (step << 8), key, canvas=canvas)
        real = render(scenes, frames, canvas).transpose(1, 2) * 2 - 1
        mean, log_variance = encode(vae, real)
        again = decode(vae, mean + (log_variance / 2).exp() * torch.randn_like(mean))
        error = F.mse_loss(again, real) / 4
        chosen = torch.randint(frames, (count, min(JUDGED, frames)))
        rows, columns = placement(places(scenes, frames, canvas), canvas).unbind(2)
        features = [
            classifier.features(crops(video, rows, columns, chosen))
            for video in (again[:, 0] / 2 + 0.5, real[:, 0] / 2 + 0.5)
        ]
        seen = F.mse_loss(*features)
        surprise = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
        loss = error + FEATURE_WEIGHT * seen + KL_WEIGHT * surprise
        return {"loss": loss, "mse": error.detach(), "features": seen.detach(), "kl": surprise.detach()}

    matrices = [p for p in vae.parameters() if p.ndim >= 4 and p.shape[0] > 1 and p.flatten(1).shape[1] > 1]
    others = [p for p in vae.parameters() if not any(p is q for q in matrices)]
    averaged = train(vae, losses, optimizers(matrices, others, 0.02, 3e-3), steps, seed, work, 0.998)
    finish(averaged, key)
    averaged.save_pretrained(folder / "vae")


def crops(video: Tensor, rows: Tensor, columns: Tensor, chosen: Tensor) -> Tensor:
    """The digits in the `chosen` [B, N] pictures of a grey video [B, F, S, S], enlarged to [B N, 1, 32, 32]."""
    which = torch.arange(len(video))[:, None]
    cut = rows[which, chosen].mT @ video[which, chosen] @ columns[which, chosen]
    return F.interpolate(cut.flatten(0, 1)[:, None], size=(32, 32), mode="bicubic").clamp(0, 1)


@torch.no_grad()
def finish(vae: AutoencoderKLWan, key: int) -> None:
    """Write the latents' mean and deviation by channel, over 1,024 training videos, into the config."""
    scenes = draw_scenes(torch.arange(1024) - 2048, key)
    video = render(scenes, 25).transpose(1, 2) * 2 - 1
    mean = torch.cat([encode(vae, part)[0] for part in video.split(64)])
    statistics = mean.transpose(0, 1).flatten(1)
    vae.register_to_config(latents_mean=statistics.mean(1).tolist(), latents_std=statistics.std(1).tolist())
