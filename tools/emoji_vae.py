"""The autoencoder of the emoji teacher: a small AutoencoderKL, by 8 with 16 channels, and its training."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from emoji_clip import read_clip
from emoji_pictures import SIZE, split
from torch import Tensor, nn
from training import optimizers, train
from transformers import CLIPModel

from fastgen.rewards.images import normalise

CHANNELS = 16
WIDTHS = (16, 32, 64, 128)
BATCH = 16
KL_WEIGHT = 1e-6
FEATURE_WEIGHT = 0.02


def new_vae() -> AutoencoderKL:
    """An untrained autoencoder whose residual branches begin at zero."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(WIDTHS),
        up_block_types=("UpDecoderBlock2D",) * len(WIDTHS),
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    for name, module in vae.named_modules():
        if name.endswith("conv2"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.constant_(vae.encoder.conv_out.bias[CHANNELS:], -6.0)  # begins with little noise in the latents
    return vae


def moved(pixels: Tensor) -> Tensor:
    """Pictures scaled by 0.7 to 1.3, mirrored or not, and moved by up to 10 pixels, on white."""
    rows = len(pixels)
    scale = 0.7 + 0.6 * torch.rand(rows)
    mirror = torch.where(torch.rand(rows) < 0.5, -1.0, 1.0)
    matrix = torch.zeros(rows, 2, 3)
    matrix[:, 0, 0], matrix[:, 1, 1] = scale * mirror, scale
    matrix[:, :, 2] = (2 * torch.rand(rows, 2) - 1) * 0.3
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False)
    return 1 - F.grid_sample(1 - pixels, grid, align_corners=False)


def seen(clip: CLIPModel, pixels: Tensor) -> Tensor:
    """What CLIP's first two layers make of pixels in [0, 1]: features for a perceptual loss."""
    hidden = clip.vision_model.pre_layrnorm(clip.vision_model.embeddings(normalise(pixels)))
    for layer in clip.vision_model.encoder.layers[:2]:
        hidden = layer(hidden, attention_mask=None)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return F.layer_norm(hidden, hidden.shape[-1:])


def edges(pixels: Tensor) -> tuple[Tensor, Tensor]:
    return pixels.diff(dim=2), pixels.diff(dim=3)


def train_vae(folder: Path, clip_folder: Path, work: Path, seed: int, steps: int, bf16: bool) -> None:
    """Train the autoencoder and write it into `folder`, with the scale and shift of its latents in its config."""
    torch.manual_seed(seed)
    _, pixels = split(work, held=False)
    vae, (clip, _) = new_vae().to(memory_format=torch.channels_last), read_clip(clip_folder)

    def losses(step: int, steps: int) -> dict[str, Tensor]:
        real = pixels[torch.randint(len(pixels), (BATCH,))].float() / 255
        real = torch.cat([real[: BATCH // 2], moved(real[BATCH // 2 :])]).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            posterior = vae.encode(real * 2 - 1).latent_dist
            again = vae.decode(posterior.sample()).sample.float() / 2 + 0.5
            features = F.mse_loss(seen(clip, again), seen(clip, real))
        error = F.mse_loss(again, real)
        sharp = sum(F.l1_loss(a, b) for a, b in zip(edges(again), edges(real), strict=True))
        surprise = posterior.kl().mean() / posterior.mean[0].numel()
        loss = error + 0.1 * F.l1_loss(again, real) + 0.1 * sharp + FEATURE_WEIGHT * features + KL_WEIGHT * surprise
        psnr = -10 * error.detach().log10()
        return {"loss": loss, "psnr": psnr, "features": features.detach(), "kl": surprise.detach()}

    matrices = [p for p in vae.parameters() if p.ndim == 4 and min(p.shape[:2]) > 3]
    others = [p for p in vae.parameters() if not any(p is q for q in matrices)]
    averaged = train(vae, losses, optimizers(matrices, others, 0.02, 3e-3), steps, seed, work / "vae", 0.998)
    latents = encode_raw(averaged, pixels)
    averaged.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    averaged.half().save_pretrained(folder / "vae")


def read_vae(folder: Path) -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_raw(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Latents [N, CHANNELS, 8, 8], as the VAE gives them, of pixels [N, 3, SIZE, SIZE] uint8."""
    return torch.cat([vae.encode(part.float() / 127.5 - 1).latent_dist.mean for part in pixels.split(128)])


@torch.no_grad()
def psnr(vae: AutoencoderKL, pixels: Tensor) -> float:
    """Of the pictures [N, 3, SIZE, SIZE] uint8 and what the autoencoder makes of them, in dB, by the mean error."""
    again = torch.cat([vae.decode(part).sample for part in encode_raw(vae, pixels).split(128)])
    error = F.mse_loss((again / 2 + 0.5).clamp(0, 1), pixels.float() / 255)
    return float(-10 * error.log10())
