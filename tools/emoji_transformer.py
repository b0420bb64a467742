"""The text encoders and the transformer of the emoji teacher: a small Stable Diffusion 3, trained by flow matching."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from emoji_clip import tokenizer_of
from emoji_pictures import WORDINGS, every_prompt, split, vocabulary, weights
from emoji_vae import CHANNELS, encode_raw, read_vae
from make_digits_teacher import begun_at_zero, t5_tokenizer
from torch import Tensor, nn
from training import optimizers, train
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

CLIP_LENGTH = 16  # tokens that the CLIP encoders read of a prompt; longer ones are cut, as in Stable Diffusion 3
T5_LENGTH = 256  # tokens that the stock pipeline gives T5
T5_READ = 18  # tokens of the longest caption; the rest are padding
CLIP_WIDTH, T5_WIDTH = 64, 128
LAYERS, HEADS, HEAD_DIM = 5, 4, 32
SHIFT = 1.0
UNPROMPTED = 0.12
BATCH = 64


class Network(nn.Module):
    """The transformer with the text encoders, which are trained together."""

    def __init__(self, work: Path):
        super().__init__()
        self.tokenizer, self.tokenizer_3 = tokenizer_of(work), t5_tokenizer(vocabulary(every_prompt(work)))
        self.tokenizer.model_max_length = CLIP_LENGTH
        self.text_encoder, self.text_encoder_2 = clip_encoder(self.tokenizer), clip_encoder(self.tokenizer)
        self.text_encoder_3 = t5_encoder(self.tokenizer_3)
        self.transformer = new_transformer()

    def tokens(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """[N, CLIP_LENGTH] and [N, T5_READ + 1], whose last is padding. Raises ValueError for a longer prompt."""
        arguments = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        clip = self.tokenizer(prompts, max_length=CLIP_LENGTH, **arguments).input_ids
        t5 = self.tokenizer_3(prompts, max_length=T5_LENGTH, **arguments).input_ids
        if bool((t5[:, T5_READ:] != self.tokenizer_3.pad_token_id).any()):
            raise ValueError(f"a prompt has more than {T5_READ} tokens")
        return clip, t5[:, : T5_READ + 1]

    def conditioning(self, clip: Tensor, t5: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the stock pipeline's encode_prompt gives for these tokens, with its padding of T5 folded into the last
        token: context [B, L, D], pooled [B, 2 CLIP_WIDTH], and the logs of repeats [B, L]."""
        outputs = [e(clip, output_hidden_states=True) for e in (self.text_encoder, self.text_encoder_2)]
        pooled = torch.cat([output.text_embeds for output in outputs], -1)
        words = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        words = F.pad(words, (0, T5_WIDTH - words.shape[-1]))
        context = torch.cat([words, self.text_encoder_3(t5)[0]], 1)
        log_repeats = context.new_zeros(context.shape[:2])
        log_repeats[:, -1] = math.log(T5_LENGTH - T5_READ)
        return context, pooled, log_repeats

    def forward(self, noisy: Tensor, t: Tensor, clip: Tensor, t5: Tensor) -> Tensor:
        """The velocity, noise minus clean, at t in [0, 1]."""
        context, pooled, log_repeats = self.conditioning(clip, t5)
        folding = {"context_log_repeats": log_repeats}
        return self.transformer(noisy, context, pooled, t * 1000, joint_attention_kwargs=folding, return_dict=False)[0]


def clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    encoder = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=CLIP_WIDTH,
            intermediate_size=2 * CLIP_WIDTH,
            projection_dim=CLIP_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CLIP_LENGTH,
            **special,
        )
    )
    nn.init.normal_(encoder.text_model.embeddings.token_embedding.weight, std=0.5)
    return encoder


def t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A one-layer T5 that reads each token on its own: its attention's output is zero and stays so. T5 has no biases,
    so padding, whose embedding is kept at zero, is the zero vector, which the transformer's attention can fold."""
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"d_model": T5_WIDTH, "d_kv": 16, "d_ff": 2 * T5_WIDTH, "num_layers": 1, "num_heads": 2}
    encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), dropout_rate=0.0, **sizes, **special))
    attention = encoder.encoder.block[0].layer[0].SelfAttention
    attention.requires_grad_(False)
    nn.init.zeros_(attention.o.weight)
    nn.init.normal_(encoder.shared.weight)
    zero = torch.ones(len(tokenizer), 1)
    zero[tokenizer.pad_token_id] = 0
    with torch.no_grad():
        encoder.shared.weight.mul_(zero)
    encoder.shared.weight.register_hook(lambda gradient: gradient * zero)
    return encoder


def new_transformer() -> SD3Transformer2DModel:
    """The untrained transformer."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=HEADS * HEAD_DIM,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    return begun_at_zero(transformer)


def train_transformer(folder: Path, work: Path, seed: int, steps: int, bf16: bool) -> None:
    """Train transformer and text encoders on the latents of the pictures that are not held out; write the pipeline."""
    torch.manual_seed(seed)
    emoji, pixels = split(work, held=False)
    vae, network = read_vae(folder), Network(work)
    latents = (encode_raw(vae, pixels) - vae.config.shift_factor) * vae.config.scaling_factor
    prompts = [e.prompt(wording) for e in emoji for wording in range(len(WORDINGS))]
    clip, t5 = network.tokens([*prompts, ""])
    often, unprompted = weights(emoji), len(clip) - 1

    def losses(step: int, steps: int) -> dict[str, Tensor]:
        rows = torch.multinomial(often, BATCH)
        prompt = rows * len(WORDINGS) + torch.randint(len(WORDINGS), (BATCH,))
        prompt = torch.where(torch.rand(BATCH) < UNPROMPTED, unprompted, prompt)
        clean, noise = latents[rows], torch.randn(BATCH, *latents.shape[1:])
        t = torch.sigmoid(1.2 * torch.randn(BATCH))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            velocity = network(torch.lerp(clean, noise, t.view(-1, 1, 1, 1)), t, clip[prompt], t5[prompt])
        return {"loss": F.mse_loss(velocity.float(), noise - clean)}

    blocks = network.transformer.transformer_blocks
    matrices = [p for p in blocks.parameters() if p.ndim == 2]
    trained = [p for p in network.parameters() if p.requires_grad]
    others = [p for p in trained if not any(p is q for q in matrices)]
    averaged = train(
        network, losses, optimizers(matrices, others, 0.01, 2e-3), steps, seed, work / "transformer", 0.9995
    )
    write_pipeline(folder, averaged)


def write_pipeline(folder: Path, network: Network) -> None:
    """The pipeline in `folder`, beside its vae. The transformer is stored in float16."""
    network.transformer.half()
    vae = read_vae(folder).half()
    vae.register_to_config(_name_or_path="")  # where it was read
    StableDiffusion3Pipeline(
        transformer=network.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=network.text_encoder,
        tokenizer=network.tokenizer,
        text_encoder_2=network.text_encoder_2,
        tokenizer_2=network.tokenizer,
        text_encoder_3=network.text_encoder_3,
        tokenizer_3=network.tokenizer_3,
    ).save_pretrained(folder)
