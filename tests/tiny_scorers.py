"""Checkpoints of every scorer in its published layout: tiny random networks of the real classes, made in a second."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from tiny_pipelines import TEXT_LENGTH, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torchvision.models.optical_flow import raft_small
from transformers import (
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from fastgen.rewards import aesthetic, hpsv3, image_reward, video_reward

SIZE = 224  # as published, of every network but Qwen's
WIDTH = 32
QUESTION = "Rate the picture of {text_prompt} . "
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% else %}<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>{% endif %}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


def fixed_images(count: int = 64) -> list[Image.Image]:
    """Crops of two photographs, 8 bits, of 150 to 400 pixels a side."""
    photographs, random = load_sample_images().images, torch.Generator().manual_seed(0)
    result = []
    for i in range(count):
        height, width = torch.randint(150, 401, (2,), generator=random).tolist()
        photograph = photographs[i % 2]
        top, left = (
            int(torch.randint(0, side - size, (), generator=random))
            for side, size in zip(photograph.shape[:2], (height, width), strict=True)
        )
        result.append(Image.fromarray(photograph[top : top + height, left : left + width]))
    return result


def loud(network: Any, std: float = 0.1) -> Any:
    """Weights large enough that pictures and prompts matter, and small enough that one grey value of noise, which a
    trained network does not see either, stays small."""
    for parameter in network.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=std)
    return network.eval()


def tiny_clip_score(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 16,
    }
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": TEXT_LENGTH}
    ends = {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")}
    config = CLIPConfig(
        text_config=tower | text | ends,
        vision_config=tower | {"image_size": SIZE, "patch_size": 32},
        projection_dim=16,
    )
    loud(CLIPModel(config), 0.1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


tiny_pickscore = tiny_clip_score


def tiny_aesthetic(folder: Path) -> Path:
    torch.manual_seed(1)
    folder.mkdir(parents=True)
    head = nn.ModuleDict({"layers": loud(aesthetic.linear_stack(16), 0.2)})
    torch.save(head.state_dict(), folder / "sac+logos+ava1-l14-linearMSE.pth")
    return folder


def tiny_hpsv2(folder: Path, version: str = "v2.1") -> Path:
    torch.manual_seed(2)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": SIZE, "layers": 2, "width": WIDTH, "head_width": 16, "patch_size": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    model = loud(open_clip.CLIP(**config), 0.1)
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, folder / f"HPS_{version}_compressed.pt")
    return folder


def tiny_image_reward(folder: Path) -> Path:
    """In BLIP's own names."""
    torch.manual_seed(3)
    folder.mkdir(parents=True)
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "red",
        "cat",
        "two",
        "green",
        "dogs",
        "the",
        "blue",
        "house",
    ]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    config = {
        "vocab_size": len(words) + 2,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": "gelu",
        "max_position_embeddings": 64,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
        "encoder_width": 768,
        "add_cross_attention": True,
    }
    (folder / "med_config.json").write_text(json.dumps(config))
    sizes = {
        "vision.embeddings.patch_embedding.weight": torch.empty(64, 3, 32, 32),
        "vision.embeddings.position_embedding": torch.empty(1, (SIZE // 32) ** 2 + 1, 64),
        "vision.encoder.layers.1.mlp.fc1.weight": torch.empty(96, 64),
        "vision.encoder.layers.0.mlp.fc1.weight": torch.empty(96, 64),
    }
    vision, text = image_reward.vision_encoder(sizes), image_reward.text_encoder(config, sizes)
    tensors = {blip_name(n): t for n, t in loud(vision, 0.1).state_dict().items()}
    tensors |= {f"blip.text_encoder.{n}": t for n, t in loud(text, 0.1).state_dict().items()}
    tensors |= {f"mlp.layers.{n}": t for n, t in loud(aesthetic.linear_stack(WIDTH), 0.2).state_dict().items()}
    tensors |= {
        "blip.vision_proj.weight": torch.zeros(4, 4),
        "blip.text_proj.bias": torch.zeros(4),
        "blip.text_encoder.embeddings.position_ids": torch.arange(64)[None],
    }
    torch.save(tensors, folder / "ImageReward.pt")
    return folder


def blip_name(name: str) -> str:
    top = {"embeddings.class_embedding": "cls_token", "embeddings.position_embedding": "pos_embed"}
    for new, old in (
        ("embeddings.patch_embedding.", "patch_embed.proj."),
        ("encoder.layers.", "blocks."),
        (".self_attn.qkv.", ".attn.qkv."),
        (".self_attn.projection.", ".attn.proj."),
        (".layer_norm1.", ".norm1."),
        (".layer_norm2.", ".norm2."),
        ("post_layernorm.", "norm."),
    ):
        name = top.get(name, name.replace(new, old))
    return f"blip.visual_encoder.{name}"


def tiny_qwen(folder: Path) -> Path:
    """The base of both judges: config, tokenizer, weights."""
    torch.manual_seed(4)
    words = [
        "[UNK]",
        *(f"<|{n}|>" for n in ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")),
        "user",
        "assistant",
        "Rate",
        "the",
        "picture",
        "of",
        ".",
        "a",
        "red",
        "cat",
    ]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", chat_template=CHAT)
    tokenizer.add_tokens(words[1:7], special_tokens=True)
    tokenizer.save_pretrained(folder)
    qwen_model(len(words)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    flat = config.pop("text_config") | config  # as the published config.json has it
    (folder / "config.json").write_text(json.dumps(flat))
    return folder


def qwen_model(vocabulary: int) -> Any:
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
        },
        vision_config={"depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 2},
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
        tie_word_embeddings=True,
    )
    return loud(Qwen2VLForConditionalGeneration(config), 0.2)


def old_names(model: Any) -> dict[str, Tensor]:
    """The state of a Qwen2-VL as checkpoints of the judges' time have it."""
    named = model.state_dict().items()
    moved = {n.replace("model.visual.", "visual.").replace("model.language_model.", "model."): t for n, t in named}
    return {name: tensor.clone() for name, tensor in moved.items()}


def tiny_hpsv3(folder: Path) -> Path:
    torch.manual_seed(5)
    folder.mkdir(parents=True)
    head = {f"rm_head.{n}": t for n, t in loud(hpsv3.head(WIDTH), 0.2).state_dict().items()}
    save_file(old_names(qwen_model(17 + 1)) | head, folder / "HPSv3.safetensors")
    (folder / "question.py").write_text(
        f"import nothing_at_all\nINSTRUCTION = {QUESTION!r}\nprompt_with_special_token = 'rating : <|Reward|> END'\n"
    )
    return folder


def tiny_video_reward(folder: Path, base: Path, adapters_alone: bool = False) -> Path:
    """A PEFT checkpoint, whole (model.pth) or adapters beside the other trained tensors."""
    torch.manual_seed(6)
    checkpoint = folder / "checkpoint-20"
    (folder / "checkpoint-3").mkdir(parents=True)
    checkpoint.mkdir()
    settings = {
        "data_config": {
            "fps": 2.0,
            "max_frame_pixels": 200704,
            "prompt_template_type": "detailed_special",
            "sample_type": "uniform",
        },
        "model_config": {"use_special_tokens": True, "reward_token": "special", "output_dim": 1},
        "peft_lora_config": {"lora_r": 2, "lora_alpha": 4, "use_rslora": False},
        "inference_config": {f"{axis}_{k}": v for axis in video_reward.AXES for k, v in (("mean", 0.5), ("std", 2.0))},
    }
    (folder / "model_config.json").write_text(json.dumps(settings))
    model = Qwen2VLForConditionalGeneration.from_pretrained(base)
    model.resize_token_embeddings(17 + 3, mean_resizing=False)
    model.rm_head = loud(nn.Linear(WIDTH, 1, bias=False), 0.1)
    layers = LoraConfig(r=2, lora_alpha=4, target_modules=r".*language_model.*(_proj)", lora_dropout=0.0)
    wrapped = get_peft_model(model, layers)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    named = old_names(wrapped)
    if not adapters_alone:
        torch.save(named, checkpoint / "model.pth")
        return folder
    save_file(
        {n.replace(".default.", "."): t for n, t in named.items() if "lora_" in n},
        checkpoint / "adapter_model.safetensors",
    )
    trained = ("rm_head", "embed_tokens", "visual")
    torch.save(
        {n: t for n, t in named.items() if any(part in n for part in trained)}, checkpoint / "non_lora_state_dict.pth"
    )
    return folder


def video_question(file: Path) -> Path:
    file.write_text(QUESTION + " ".join(video_reward.TOKENS))
    return file


def tiny_raft(folder: Path) -> Path:
    torch.manual_seed(7)
    folder.mkdir(parents=True)
    torch.save(raft_small().state_dict(), folder / "raft_small_C_T_V2-01064c6d.pth")
    return folder
