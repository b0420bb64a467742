"""What the launcher was told, by a flag or by accelerate's configuration, against what the recipe says.

`accelerate launch` hands its flags to the program as environment variables. The recipe decides how a run is computed,
so a flag that says something else is refused rather than ignored."""

import os
from collections.abc import Iterator

from fastgen.recipe import TrainConfig
from fastgen.registry import RecipeError

UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
    "FSDP_OFFLOAD_PARAMS": "the offloading of sharded parameters",
}


def check_launcher(train: TrainConfig) -> None:
    """Raises RecipeError, with all that differs, if the launcher asks for something else than the recipe.

    The launcher's defaults (no mixed precision, one accumulated batch, no FSDP) ask for nothing, as it hands them over
    whether or not they were given."""
    if found := list(differences(train)):
        raise RecipeError("\n".join(found))


def differences(train: TrainConfig) -> Iterator[str]:
    for variable, name in UNSUPPORTED.items():
        if said(variable) == "true":
            yield (
                f"the launcher is configured for {name}, which fastgen does not support; configure accelerate for "
                "multi-GPU or FSDP"
            )
    precision = said("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", train.mixed_precision):
        change = f"set train.mixed_precision={precision}, or " if precision == "bf16" else ""
        yield (
            f"train.mixed_precision is {train.mixed_precision}, but the launcher was told {precision}; {change}launch "
            f"with --mixed_precision {train.mixed_precision}"
        )
    accumulate = said("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulate not in ("1", "auto", str(train.accumulate)):
        yield (
            f"train.accumulate is {train.accumulate}, but the launcher was told {accumulate}; set "
            f"train.accumulate={accumulate}, or leave out --gradient_accumulation_steps"
        )
    if (backend := said("ACCELERATE_DYNAMO_BACKEND", "no")) != "no":
        yield f"the launcher was told to compile with {backend}, which fastgen does not do; leave out --dynamo_backend"
    if said("ACCELERATE_USE_FSDP") == "true" and train.strategy == "ddp":
        yield "train.strategy is ddp, but the launcher is configured for FSDP; set train.strategy to auto or fsdp"
    if said("FSDP_ACTIVATION_CHECKPOINTING") == "true" and not train.gradient_checkpointing:
        yield (
            "train.gradient_checkpointing is false, but the launcher was told --fsdp_activation_checkpointing; set "
            "train.gradient_checkpointing=true, or leave that flag out"
        )
    if said("ACCELERATE_USE_CPU") == "true" and train.device == "cuda":
        yield "train.device is cuda, but the launcher was told --cpu; set train.device to auto or cpu"


def said(variable: str, otherwise: str = "") -> str:
    return os.environ.get(variable, otherwise).lower() or otherwise
