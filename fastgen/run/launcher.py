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
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "the offloading of checkpointed activations",
    "FSDP_FORWARD_PREFETCH": "forward prefetching",
}

DYNAMO = {  # how accelerate would compile -> what that says by default
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "false",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "false",
}

# FSDP's settings: the values that say what fastgen does, and what that is. How accelerate would save (the state dict
# type) is not among them, as checkpoints are fastgen's own.
FSDP = {
    "FSDP_RESHARD_AFTER_FORWARD": (("true", "full_shard"), "gathered weights are freed after each block"),
    "FSDP_AUTO_WRAP_POLICY": (("transformer_based_wrap",), "weights are gathered block by block"),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": ((), "the blocks are those of the model family"),
    "FSDP_MIN_NUM_PARAMS": (("100000000",), "the blocks are those of the model family"),  # accelerate's default
    "FSDP_IGNORED_MODULES": ((), "every network is sharded"),
    "FSDP_BACKWARD_PREFETCH": (("backward_pre", "1"), "the next block is gathered before a backward pass"),
    "FSDP_USE_ORIG_PARAMS": (("true",), "FSDP2 keeps the original parameters"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (("true",), "every process reads its own slice of the weights"),
    "FSDP_SYNC_MODULE_STATES": (("true",), "all processes start from the same weights"),
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
    backend = said("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend not in ("no", "inductor"):
        yield f"the launcher was told to compile with {backend}, and fastgen compiles with inductor (train.compile)"
    elif backend == "inductor" and not train.compile:
        yield (
            "train.compile is false, but the launcher was told --dynamo_backend inductor; set train.compile=true, or "
            "leave that flag out"
        )
    for variable, same in DYNAMO.items():
        if said(variable, same) != same:
            yield f"the launcher was told {variable}={said(variable)}, which train.compile does not do; leave it out"
    if said("ACCELERATE_USE_FSDP") == "true" and train.strategy == "ddp":
        yield "train.strategy is ddp, but the launcher is configured for FSDP; set train.strategy to auto or fsdp"
    if said("FSDP_ACTIVATION_CHECKPOINTING") == "true" and not train.gradient_checkpointing:
        yield (
            "train.gradient_checkpointing is false, but the launcher was told --fsdp_activation_checkpointing; set "
            "train.gradient_checkpointing=true, or leave that flag out"
        )
    if said("ACCELERATE_USE_FSDP") == "true":
        yield from fsdp_differences(train)
    if said("ACCELERATE_USE_CPU") == "true" and train.device == "cuda":
        yield "train.device is cuda, but the launcher was told --cpu; set train.device to auto or cpu"


def fsdp_differences(train: TrainConfig) -> Iterator[str]:
    for variable, (same, what) in FSDP.items():
        if (value := said(variable)) and value not in same:
            yield f"the launcher was told {variable}={value}, but {what}; leave that setting out"
    strategy = said("FSDP_SHARDING_STRATEGY", "full_shard")
    if strategy in ("hybrid_shard", "4"):
        if train.shard_group is None:
            yield (
                "the launcher was told HYBRID_SHARD, but train.shard_group is not given; set it to the number of "
                "processes that share a copy of the networks, such as the GPUs of one machine"
            )
    elif strategy not in ("full_shard", "1"):
        yield (
            f"the launcher was told the sharding strategy {strategy.upper()}, but fastgen shards weights, gradients "
            "and optimizers; choose FULL_SHARD, or HYBRID_SHARD with train.shard_group"
        )


def said(variable: str, otherwise: str = "") -> str:
    return os.environ.get(variable, otherwise).lower() or otherwise
