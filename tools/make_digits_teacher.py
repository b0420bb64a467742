"""Make the digits teacher: a real, tiny Stable Diffusion 3 folder, and the classifier that judges its pictures.

Everything is trained from scratch on scikit-learn's handwritten digits, the held-out third never seen:

    python tools/make_digits_teacher.py --output assets

Each stage writes its part under `--output` and reads the earlier parts from there, so a stage can be run again alone.
"""

import argparse
import copy
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from fastgen.backbones.sd3_attention import FoldedJointAttnProcessor, fold_repeats
from fastgen.data.digits import DIGIT_WORDS, PROMPTS, DigitsClassifier, load_digits, prompt_for
from fastgen.metrics.fid import Precomputed

STAGES = ("classifier", "text", "vae", "transformer", "measure")
CLASSES = len(DIGIT_WORDS)

SCHEDULER_SHIFT = 1.0
GUIDANCE = 1.0
PROMPT_DROPOUT = 0.12
BATCH = 64
CYCLE_RATES = (1.5e-3,)  # more cycles, each from the average of the last, gained nothing
SAMPLED_AT_ONCE = 64
SWEPT_GUIDANCE = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0)
SWEPT_STEPS = (50, 8, 4)

LATENT_CHANNELS = 2
LAYERS, HEADS, HEAD_DIM = 4, 4, 32
CLIP_WIDTH = 32
CLIP_LENGTH = 8
T5_WIDTH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("assets"), help="the assets folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="in their usual order")
    parser.add_argument("--classifier-epochs", type=int, default=60)
    parser.add_argument("--vae-steps", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=8000, help="training steps of the transformer, in each cycle")
    parser.add_argument(
        "--first-cycle", type=int, default=0, help="start at this learning-rate cycle, from the transformer written"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; the weights depend on it in the last digits"
    )
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    run = {"classifier": make_classifier, "text": make_text, "vae": make_vae, "transformer": make_transformer}
    run["measure"] = measure
    for stage in STAGES:
        if stage in args.stages:
            torch.manual_seed(args.seed)
            run[stage](args)


def teacher_folder(args: argparse.Namespace) -> Path:
    return args.output / "teachers" / "digits"


# --- shared pieces


def augmented(pixels: Tensor, strength: float) -> Tensor:
    """Pixels [B, 3, 32, 32], each turned (12 degrees), scaled (10 %) and moved (2 pixels), at most, by `strength`."""
    rows = len(pixels)
    turn, scale, *move = (strength * (2 * torch.rand(4, rows, device=pixels.device) - 1)).unbind()
    angle, scale = turn * math.radians(12), 1 + 0.1 * scale
    cos, sin = scale * angle.cos(), scale * angle.sin()
    matrix = torch.stack([cos, -sin, move[0] / 8, sin, cos, move[1] / 8], dim=1).view(rows, 2, 3)
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, align_corners=False)


def batches(count: int, size: int, steps: int, name: str, device: str) -> Iterator[tuple[Tensor, tqdm]]:
    """`steps` batches of indices below `count`, reshuffled every epoch, with a progress bar that shows the loss."""
    shuffled = torch.randperm(count, device=device)
    with tqdm(total=steps, desc=name, mininterval=5) as bar:
        for _ in range(steps):
            if len(shuffled) < size:
                shuffled = torch.cat([shuffled, torch.randperm(count, device=device)])
            yield shuffled[:size], bar
            shuffled = shuffled[size:]
            bar.update()


def one_cycle(parameters: list[nn.Parameter], rate: float, steps: int, decay: float):
    """AdamW with a short warm-up to `rate` and a cosine decay to zero."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=decay)
    cycle = {"total_steps": steps, "pct_start": 0.05, "cycle_momentum": False}
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, **cycle)


def step(loss: Tensor, optimizer: torch.optim.Optimizer, schedule) -> None:
    """One optimiser step down `loss`."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    schedule.step()


# --- the classifier


def make_classifier(args: argparse.Namespace) -> None:
    """Train the classifier on augmented training digits; write its weights and its held-out accuracy."""
    pixels, labels = (tensor.to(args.device) for tensor in load_digits("train"))
    classifier = DigitsClassifier().to(args.device)
    steps = args.classifier_epochs * len(pixels) // 64
    optimizer, schedule = one_cycle(list(classifier.parameters()), 2e-3, steps, decay=0.05)
    for chosen, bar in batches(len(pixels), 64, steps, "classifier", args.device):
        logits = classifier(augmented(pixels[chosen], 1.0))
        loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
        step(loss, optimizer, schedule)
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)

    folder = args.output / "classifiers"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(classifier.state_dict(), folder / "digits.safetensors")
    accuracy = {split: accuracy_of(classifier.eval(), *load_digits(split), args.device) for split in ("train", "test")}
    stated = {"train_accuracy": accuracy["train"], "held_out_accuracy": accuracy["test"], "seed": args.seed}
    (folder / "digits.json").write_text(json.dumps(stated, indent=2) + "\n")
    print(f"classifier accuracy: {accuracy}")


def read_classifier(args: argparse.Namespace) -> DigitsClassifier:
    classifier = DigitsClassifier()
    classifier.load_state_dict(load_file(args.output / "classifiers" / "digits.safetensors"))
    return classifier.eval().requires_grad_(False).to(args.device)


@torch.no_grad()
def accuracy_of(classifier: DigitsClassifier, pixels: Tensor, labels: Tensor, device: str) -> float:
    """The share of pixels [N, 3, 32, 32] classified as labels [N]."""
    guesses = torch.cat([classifier(part.to(device)).argmax(1).cpu() for part in pixels.split(500)])
    return (guesses == labels.cpu()).float().mean().item()


# --- tokenizers and text encoders


def make_text(args: argparse.Namespace) -> None:
    """Write the tokenizers, which know every word of the prompts, and the random, frozen text encoders."""
    folder = teacher_folder(args)
    words = sorted(set(" ".join(PROMPTS).format(*DIGIT_WORDS).split()) | set(DIGIT_WORDS))
    for suffix in ("", "_2"):
        tokenizer = clip_tokenizer(words)
        tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
        clip_encoder(tokenizer).save_pretrained(folder / f"text_encoder{suffix}")
    tokenizer = t5_tokenizer(words)
    tokenizer.save_pretrained(folder / "tokenizer_3")
    t5_encoder(tokenizer).save_pretrained(folder / "text_encoder_3")


def clip_tokenizer(words: list[str]) -> CLIPTokenizer:
    """A byte-pair tokenizer that makes one token of each of `words` and spells any other word in letters.

    Each word is merged from its left. Longer words come first, so that a word inside another ("written" in
    "handwritten") does not take it apart.
    """
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    vocabulary = dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters)])
    merges = {}
    for word in sorted(words, key=lambda word: (-len(word), word)):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        for end in range(1, len(pieces)):
            left = "".join(pieces[:end])
            merges[left, pieces[end]] = None
            vocabulary[left + pieces[end]] = None
    numbered = {token: number for number, token in enumerate([*vocabulary, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=numbered, merges=list(merges), model_max_length=CLIP_LENGTH)
    split = [word for word in words if len(tokenizer(word).input_ids) != 3]
    if split:
        raise ValueError(f"the merges do not make single tokens of {split}")
    return tokenizer


def clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """A random two-layer CLIP text encoder whose embeddings are large enough to tell the words well apart."""
    encoder = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=CLIP_WIDTH,
            intermediate_size=2 * CLIP_WIDTH,
            projection_dim=CLIP_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CLIP_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    embeddings = encoder.text_model.embeddings
    nn.init.normal_(embeddings.token_embedding.weight, std=1.0)
    nn.init.normal_(embeddings.position_embedding.weight, std=0.3)
    return encoder.eval()


def t5_tokenizer(words: list[str]) -> T5Tokenizer:
    """A unigram tokenizer that makes one token of each of `words` and spells any other word in characters."""
    characters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    spelled = [("▁", -8.0), *((character, -10.0) for character in characters)]
    known = [(f"▁{word}", -2.0) for word in words]
    return T5Tokenizer(vocab=[*special, *spelled, *known], extra_ids=0, model_max_length=256)


def t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A random one-layer T5 encoder that turns every padding token into exactly the zero vector.

    Its attention output is zero, so each token is read on its own, and T5 has no biases, so a zero embedding stays
    zero. Identical padding is what lets `fold_repeats` fold it.
    """
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=T5_WIDTH,
            d_kv=16,
            d_ff=2 * T5_WIDTH,
            num_layers=1,
            num_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    nn.init.zeros_(encoder.encoder.block[0].layer[0].SelfAttention.o.weight)
    with torch.no_grad():
        encoder.shared.weight[tokenizer.pad_token_id] = 0
    return encoder.eval()


# --- the autoencoder


def make_vae(args: argparse.Namespace) -> None:
    """Train the autoencoder on augmented training digits; write it with the scale and shift of its latents."""
    pixels, _ = load_digits("train")
    pixels, classifier = pixels.to(args.device), read_classifier(args)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    ).to(args.device, memory_format=torch.channels_last)
    optimizer, schedule = one_cycle(list(vae.parameters()), 3e-3, args.vae_steps, decay=0.0)
    for chosen, bar in batches(len(pixels), 32, args.vae_steps, "vae", args.device):
        real = augmented(pixels[chosen], 0.5)
        posterior = vae.encode(real * 2 - 1).latent_dist
        again = vae.decode(posterior.sample()).sample / 2 + 0.5
        error = F.mse_loss(again, real)
        perceptual = F.mse_loss(classifier.features(again), classifier.features(real))
        surprise = posterior.kl().mean() / posterior.mean[0].numel()
        step(error + 0.02 * perceptual + 3e-5 * surprise, optimizer, schedule)
        bar.set_postfix(mse=f"{error.item():.6f}", kl=f"{surprise.item():.2f}", refresh=False)

    with torch.no_grad():
        latents = vae.eval().encode(pixels * 2 - 1).latent_dist.mean
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    vae.save_pretrained(teacher_folder(args) / "vae")
    print(f"latent std by channel: {(latents.std((0, 2, 3)) * vae.config.scaling_factor).tolist()}")


def read_vae(args: argparse.Namespace) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(teacher_folder(args) / "vae").eval().requires_grad_(False).to(args.device)


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Normalised latents [N, C, 8, 8] of pixels [N, 3, 32, 32] in [0, 1]."""
    latents = [vae.encode(part.to(vae.device) * 2 - 1).latent_dist.mean for part in pixels.split(500)]
    return (torch.cat(latents) - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pixels [N, 3, 32, 32] in [0, 1], on the CPU, of normalised latents, decoded and clamped as the pipeline does."""
    raw = latents / vae.config.scaling_factor + vae.config.shift_factor
    return torch.cat([(vae.decode(part).sample / 2 + 0.5).clamp(0, 1).cpu() for part in raw.split(500)])


# --- the transformer


def make_transformer(args: argparse.Namespace) -> None:
    """Train the transformer by flow matching on the latents of the training digits; write the whole pipeline."""
    pixels, labels = load_digits("train")
    vae = read_vae(args)
    latents, labels = encode(vae, pixels), labels.to(args.device)
    transformer = new_transformer().to(args.device)
    averaged = copy.deepcopy(transformer).requires_grad_(False)
    parts = {"transformer": averaged, "vae": vae, "scheduler": FlowMatchEulerDiscreteScheduler(shift=SCHEDULER_SHIFT)}
    pipe = StableDiffusion3Pipeline(**parts, **read_text(args))
    context, pooled, log_repeats = encode_prompts(pipe, args.device)
    unprompted = len(context) - 1

    minutes = 0.0
    if args.first_cycle:
        averaged.load_state_dict(read_transformer(args).state_dict())
        minutes = json.loads((teacher_folder(args) / "training.json").read_text())["minutes"]
    for cycle in range(args.first_cycle, len(CYCLE_RATES)):
        started = time.perf_counter()
        transformer.load_state_dict(averaged.state_dict())
        if cycle:  # a run resumed here must draw what a whole one draws
            torch.manual_seed(args.seed + cycle)
        optimizer, schedule = one_cycle(list(transformer.parameters()), CYCLE_RATES[cycle], args.steps, decay=0.01)
        for count, (chosen, bar) in enumerate(batches(len(latents), BATCH, args.steps, "transformer", args.device)):
            wording = torch.randint(len(PROMPTS), chosen.shape, device=args.device)
            dropped = torch.rand(len(chosen), device=args.device) < PROMPT_DROPOUT
            prompt = torch.where(dropped, unprompted, labels[chosen] * len(PROMPTS) + wording)
            clean, noise = latents[chosen], torch.randn_like(latents[chosen])
            t = torch.sigmoid(1.4 * torch.randn(len(clean), device=args.device))
            noisy = torch.lerp(clean, noise, t.view(-1, 1, 1, 1))
            velocity = forward(transformer, noisy, t, context[prompt], pooled[prompt], log_repeats[prompt])
            loss = F.mse_loss(velocity, noise - clean)
            step(loss, optimizer, schedule)
            average_into(averaged, transformer, decay=min(0.999, (1 + count) / (10 + count)))
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        minutes += (time.perf_counter() - started) / 60
        pipe.save_pretrained(teacher_folder(args))  # after every cycle, so that the next can start from here
        training = {"steps": (cycle + 1) * args.steps, "minutes": minutes}
        (teacher_folder(args) / "training.json").write_text(json.dumps(training) + "\n")


def read_transformer(args: argparse.Namespace) -> SD3Transformer2DModel:
    return SD3Transformer2DModel.from_pretrained(teacher_folder(args) / "transformer")


def new_transformer() -> SD3Transformer2DModel:
    """The untrained transformer."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=HEADS * HEAD_DIM,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=8,
    )
    return begun_at_zero(transformer)


def begun_at_zero(transformer: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """Sets its modulations and output to zero, as is usual for diffusion transformers, and folds repeated tokens."""
    modulations = [norm for block in transformer.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for layer in [*(norm.linear for norm in (*modulations, transformer.norm_out)), transformer.proj_out]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    transformer.set_attn_processor(FoldedJointAttnProcessor())
    return transformer


def read_text(args: argparse.Namespace) -> dict[str, object]:
    """The tokenizers and text encoders, by the pipeline's names for them."""
    kinds = {"": (CLIPTokenizer, CLIPTextModelWithProjection), "_3": (T5Tokenizer, T5EncoderModel)}
    kinds["_2"] = kinds[""]
    parts = {}
    for suffix, (tokenizer, encoder) in kinds.items():
        parts[f"tokenizer{suffix}"] = tokenizer.from_pretrained(teacher_folder(args) / f"tokenizer{suffix}")
        parts[f"text_encoder{suffix}"] = encoder.from_pretrained(teacher_folder(args) / f"text_encoder{suffix}").eval()
    return parts


@torch.no_grad()
def encode_prompts(pipe: StableDiffusion3Pipeline, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """All prompts, each digit in each wording, then the empty one: context, pooled, log repeats of the fold."""
    prompts = [prompt_for(label, wording) for label in range(CLASSES) for wording in range(len(PROMPTS))] + [""]
    context, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    context, log_repeats = fold_repeats(context)
    return context.to(device), pooled.to(device), log_repeats.to(device)


def forward(
    transformer: SD3Transformer2DModel, noisy: Tensor, t: Tensor, context: Tensor, pooled: Tensor, log_repeats: Tensor
) -> Tensor:
    """The velocity (noise minus clean) at time t in [0, 1]."""
    folding = {"context_log_repeats": log_repeats}
    return transformer(noisy, context, pooled, t * 1000, joint_attention_kwargs=folding, return_dict=False)[0]


@torch.no_grad()
def average_into(averaged: nn.Module, module: nn.Module, decay: float) -> None:
    """Move the running average of the weights towards those of `module`."""
    torch._foreach_lerp_(list(averaged.parameters()), list(module.parameters()), 1 - decay)


# --- measuring


@torch.no_grad()
def sample(pipe: StableDiffusion3Pipeline, labels: Tensor, steps: int, guidance: float, noise: Tensor) -> Tensor:
    """Pixels [N, 3, 32, 32] for `labels`, first wording, as the pipeline makes them from the latents `noise`."""
    context, pooled, log_repeats = encode_prompts(pipe, noise.device)
    pipe.scheduler.set_timesteps(steps)
    sigmas = pipe.scheduler.sigmas.to(noise.device)
    prompt, latents = labels.to(noise.device) * len(PROMPTS), []
    for x, wanted in zip(noise.split(SAMPLED_AT_ONCE), prompt.split(SAMPLED_AT_ONCE), strict=True):
        rows = torch.cat([torch.full_like(wanted, len(context) - 1), wanted]) if guidance > 1 else wanted
        conditions = context[rows], pooled[rows], log_repeats[rows]
        for now, after in itertools.pairwise(sigmas):
            doubled = x.repeat(len(rows) // len(x), 1, 1, 1)
            velocity = forward(pipe.transformer, doubled, now.expand(len(rows)), *conditions)
            if guidance > 1:
                plain, asked = velocity.chunk(2)
                velocity = plain + guidance * (asked - plain)
            x = x + (after - now) * velocity
        latents.append(x)
    return decode(pipe.vae, torch.cat(latents))


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """The Frechet distance between the Gaussians fitted to features [N, D] and others [M, D], as `fid` measures it."""
    distance = FrechetInceptionDistance(feature=Precomputed(features.shape[1]))
    distance.update(features.double(), real=True)
    distance.update(others.double(), real=False)
    return float(distance.compute())


def measure(args: argparse.Namespace) -> None:
    """Measure the written teacher against the held-out digits; print and write metrics.json and the model card."""
    folder, classifier = teacher_folder(args), read_classifier(args)
    pipe = StableDiffusion3Pipeline.from_pretrained(folder).to(args.device)
    difference = difference_to_plain_call(pipe, args)
    pipe.transformer.set_attn_processor(FoldedJointAttnProcessor())
    held_out, labels = load_digits("test")
    train = same_labels_from_train(labels)

    @torch.no_grad()
    def distance(pixels: Tensor) -> float:
        features = [classifier.features(images.to(args.device)).cpu() for images in (pixels, held_out)]
        return frechet_distance(*features)

    def score(steps: int, guidance: float, seed: int) -> dict[str, float]:
        pixels = sample(pipe, labels, steps, guidance, noise_for(len(labels), args, seed))
        accuracy = accuracy_of(classifier, pixels, labels, args.device)
        return {"steps": steps, "guidance": guidance, "fd": distance(pixels), "accuracy": accuracy}

    sweep = [(steps, guidance) for guidance in SWEPT_GUIDANCE for steps in SWEPT_STEPS]
    table = [score(*setting, args.seed) for setting in tqdm(sweep, desc="sweep")]
    repeated = {row["steps"]: [row["fd"]] for row in table if row["guidance"] == GUIDANCE}
    for steps, distances in repeated.items():
        distances.extend(score(steps, GUIDANCE, args.seed + again)["fd"] for again in (1, 2))
    many = torch.arange(CLASSES).repeat_interleave(400)
    pixels = sample(pipe, many, SWEPT_STEPS[0], GUIDANCE, noise_for(len(many), args, args.seed))
    metrics = {
        "guidance": GUIDANCE,
        "scheduler_shift": SCHEDULER_SHIFT,
        "accuracy_50_steps_4000_samples": accuracy_of(classifier, pixels, many, args.device),
        "fd_train_digits": distance(train),
        "fd_train_digits_through_vae": distance(decode(pipe.vae, encode(pipe.vae, train))),
        "fd_held_out_digits_through_vae": distance(decode(pipe.vae, encode(pipe.vae, held_out))),
        **{f"fd_{steps}_steps": sum(distances) / len(distances) for steps, distances in repeated.items()},
        **{f"fd_{steps}_steps_by_noise_seed": distances for steps, distances in repeated.items()},
        "classifier_held_out_accuracy": accuracy_of(classifier, held_out, labels, args.device),
        "fast_sampler_largest_pixel_difference": difference,
        "parameters": parameters_of(pipe),
        "forward_ms_batch_64": forward_ms(pipe, args.device),
        "training": json.loads((folder / "training.json").read_text()),
        "sweep": table,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    (folder / "README.md").write_text(model_card(metrics))
    print(json.dumps({name: value for name, value in metrics.items() if name != "sweep"}, indent=2))
    print(sweep_table(table))


def noise_for(count: int, args: argparse.Namespace, seed: int) -> Tensor:
    """Starting latents for `count` samples."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, LATENT_CHANNELS, 8, 8, generator=generator).to(args.device)


def same_labels_from_train(labels: Tensor) -> Tensor:
    """The first training digits that have exactly `labels` between them: pixels [N, 3, 32, 32]."""
    pixels, of_train = load_digits("train")
    chosen = [torch.nonzero(of_train == label)[:count, 0] for label, count in enumerate(labels.bincount())]
    return pixels[torch.cat(chosen)]


@torch.no_grad()
def difference_to_plain_call(pipe: StableDiffusion3Pipeline, args: argparse.Namespace) -> float:
    """The largest pixel difference between the fast sampler and the plain call, from the same latents."""
    noise, labels = noise_for(CLASSES, args, args.seed), torch.arange(CLASSES)
    prompts = [prompt_for(label) for label in range(CLASSES)]
    plain = pipe(prompts, num_inference_steps=10, guidance_scale=2.0, latents=noise, output_type="pt").images.cpu()
    stock = pipe.transformer.attn_processors
    pipe.transformer.set_attn_processor(FoldedJointAttnProcessor())
    fast = sample(pipe, labels, 10, 2.0, noise)
    pipe.transformer.set_attn_processor(stock)
    return (plain - fast).abs().max().item()


def parameters_of(pipe: StableDiffusion3Pipeline) -> dict[str, int]:
    """How many parameters each network of the pipeline has."""
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in networks.items()}


@torch.no_grad()
def forward_ms(pipe: StableDiffusion3Pipeline, device: str) -> float:
    """Milliseconds of one folded forward of the transformer at batch 64."""
    conditions = [part[:1].repeat(64, *[1] * (part.ndim - 1)) for part in encode_prompts(pipe, device)]
    noisy, t = torch.randn(64, LATENT_CHANNELS, 8, 8, device=device), torch.full((64,), 0.5, device=device)
    durations = []
    for _ in range(20):
        started = time.perf_counter()
        forward(pipe.transformer, noisy, t, *conditions).sum().item()
        durations.append(1000 * (time.perf_counter() - started))
    return sorted(durations)[len(durations) // 2]


def sweep_table(table: list[dict[str, float]]) -> str:
    """The sweep as a Markdown table: a row for each guidance, Frechet distance and accuracy for each step count."""
    lines = ["| guidance | " + " | ".join(f"{steps} steps: FD | as asked" for steps in SWEPT_STEPS) + " |"]
    lines.append("|---" * (1 + 2 * len(SWEPT_STEPS)) + "|")
    for guidance in SWEPT_GUIDANCE:
        cells = [f"{row['fd']:.3f} | {row['accuracy']:.1%}" for row in table if row["guidance"] == guidance]
        lines.append(f"| {guidance} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def model_card(metrics: dict) -> str:
    """The README of the teacher folder."""
    sizes = "\n".join(f"| {name} | {count:,} |" for name, count in metrics["parameters"].items())
    return f"""---
license: apache-2.0
inference:
  parameters: {{guidance_scale: {metrics["guidance"]}, num_inference_steps: 50}}
---

# Digits teacher

A real, tiny Stable Diffusion 3 pipeline that draws handwritten digits, 32x32 pixels. It exists so that the whole of
fastgen can be run and tested in minutes on a CPU. Made by `tools/make_digits_teacher.py`.

```python
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained("assets/teachers/digits")
image = pipe("{prompt_for(7)}", num_inference_steps=50, guidance_scale={metrics["guidance"]}).images[0]
```

Prompts it knows: {", ".join(f'"{wording.format("seven")}"' for wording in PROMPTS)}, for each digit
{", ".join(DIGIT_WORDS)}; and the empty prompt, for guidance. Other words were never trained on.

## Data and licence

Trained from scratch on 1,198 of the 1,797 digits that scikit-learn ships (the test part of the UCI "Optical
Recognition of Handwritten Digits" data, E. Alpaydin and C. Kaynak, 1998, CC BY 4.0), enlarged from 8x8 to 32x32. The
other 599 are held out: autoencoder, transformer and classifier never saw them, though the guidance was chosen by the
FD to them. Nothing was taken from another model, so no other model's licence applies; the weights go under the
licence of this repository.

## What it is

| part | parameters |
|---|---|
{sizes}

The text encoders are random and frozen; the transformer learned to read them. The T5 turns padding into exact zero
vectors, which lets `fastgen.backbones.sd3_attention` fold the 250-odd padding tokens into one without changing the
result. Scheduler shift {metrics["scheduler_shift"]}. The transformer had {metrics["training"]["steps"]:,} steps of
batch {BATCH} in {metrics["training"]["minutes"]:.0f} minutes; the weights are the running average.

## Measured

FD is the Frechet distance on the shipped classifier's features between 599 pictures and the 599 held-out digits, with
the same labels. The classifier is right on {metrics["classifier_held_out_accuracy"]:.1%} of the held-out digits.
Guidance is {metrics["guidance"]} unless said otherwise.

| | |
|---|---|
| classified as asked, 4,000 samples, 50 steps | {metrics["accuracy_50_steps_4000_samples"]:.2%} |
| FD of 599 training digits | {metrics["fd_train_digits"]:.3f} |
| FD of the same training digits through the autoencoder | {metrics["fd_train_digits_through_vae"]:.3f} |
| FD of the held-out digits through the autoencoder | {metrics["fd_held_out_digits_through_vae"]:.3f} |
| FD of the teacher, 50 steps (mean of 3 noise seeds) | {metrics["fd_50_steps"]:.3f} |
| FD of the teacher, 8 steps (mean of 3 noise seeds) | {metrics["fd_8_steps"]:.3f} |
| FD of the teacher, 4 steps (mean of 3 noise seeds) | {metrics["fd_4_steps"]:.3f} |

One noise seed, 599 samples each:

{sweep_table(metrics["sweep"])}
"""


if __name__ == "__main__":
    main()
