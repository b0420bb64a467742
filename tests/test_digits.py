"""The digits split, prompts and classifier, and the shipped digits teacher as a plain diffusers pipeline."""

import json

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from fastgen.data.digits import (
    DIGIT_WORDS,
    PROMPTS,
    DigitsClassifier,
    assets_dir,
    label_of,
    load_classifier,
    load_digits,
    prompt_for,
)

TEACHER = assets_dir() / "teachers" / "digits"


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(TEACHER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_digits_have_the_stated_shape_and_range():
    for split, count in (("train", 1198), ("test", 599)):
        pixels, labels = load_digits(split)
        assert pixels.shape == (count, 3, 32, 32) and pixels.dtype == torch.float32
        assert labels.shape == (count,) and labels.dtype == torch.int64
        assert pixels.min() >= 0 and 0.9 < pixels.max() <= 1
        assert torch.equal(pixels[:, 0], pixels[:, 2])
    with pytest.raises(ValueError, match="'train' or 'test'"):
        load_digits("validation")


def test_split_is_disjoint_stratified_and_fixed():
    (train, train_labels), (test, test_labels) = load_digits("train"), load_digits("test")
    apart = torch.cdist(train[:, 0].flatten(1), test[:, 0].flatten(1))
    assert apart.min() > 0.1
    whole = train_labels.bincount() + test_labels.bincount()
    assert (test_labels.bincount() - whole / 3).abs().max() < 1
    assert test_labels[:12].tolist() == [2, 3, 7, 0, 8, 4, 8, 4, 6, 5, 4, 9]


def test_prompts_name_their_digit():
    for wording in range(len(PROMPTS)):
        assert [label_of(prompt_for(label, wording)) for label in range(10)] == list(range(10))
    assert prompt_for(7) == "a handwritten seven"
    assert label_of("A big SEVEN, please") == 7
    with pytest.raises(ValueError, match="no digit word"):
        label_of("a handwritten letter")


@torch.no_grad()
def test_classifier_is_as_good_as_stated():
    classifier = load_classifier()
    pixels, labels = load_digits("test")
    stated = json.loads((assets_dir() / "classifiers" / "digits.json").read_text())["held_out_accuracy"]
    accuracy = (classifier(pixels).argmax(1) == labels).float().mean().item()
    assert accuracy >= stated - 1e-6 and stated >= 0.975
    features = classifier.features(pixels)
    assert features.shape == (599, DigitsClassifier.feature_dim)
    assert torch.linalg.eigvalsh(features.double().T.cov()).min() > 1e-3, "the Frechet distance needs full rank"


def test_loaded_classifier_is_frozen():
    classifier = load_classifier()
    assert not classifier.training
    assert not any(parameter.requires_grad for parameter in classifier.parameters())


def test_teacher_is_a_small_plain_diffusers_folder():
    files = [path for path in (assets_dir() / "teachers").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".txt", ".png"}


@torch.no_grad()
def test_tokenizers_know_the_words_and_padding_is_zero(pipe):
    prompts = [prompt_for(label, wording) for label in range(10) for wording in range(len(PROMPTS))]
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        assert {len(tokenizer(word).input_ids) for word in DIGIT_WORDS} == {3}
        assert max(len(tokenizer(prompt).input_ids) for prompt in prompts) <= tokenizer.model_max_length
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    assert embeds.shape == (len(prompts), 8 + 256, 64)
    assert embeds[:, 8 + 4 :].abs().max() == 0
    assert torch.pdist(pooled).min() > 0.3


@pytest.mark.slow
def test_plain_call_draws_the_digits_asked_for(pipe):
    labels = torch.arange(10).repeat(2)
    prompts = [prompt_for(label, row % len(PROMPTS)) for row, label in enumerate(labels.tolist())]
    images = pipe(
        prompts,
        num_inference_steps=10,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert images.shape == (20, 3, 32, 32)
    with torch.no_grad():
        right = (load_classifier()(images).argmax(1) == labels).float().mean()
    assert right >= 0.9


def test_plain_call_takes_one_prompt(pipe):
    image = pipe("a handwritten seven", num_inference_steps=2, guidance_scale=1.5).images[0]
    assert image.size == (32, 32)
