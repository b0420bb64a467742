"""What a planned run costs: floating-point operations, and from a stated speed the seconds, GPU hours and price."""

from dataclasses import dataclass

from fastgen.planning.plan import Plan

UTILISATION = 0.4  # ours: of the share of a GPU's peak speed that large transformers reach in training


@dataclass(frozen=True)
class Speed:
    """How fast a GPU computes, as the user states it. tflops: its peak in the run's precision, in 1e12 operations a
    second (dense; 989 for an H100 in bfloat16, 312 for an A100, by their data sheets). utilisation: the share of it
    that the run reaches. price: of a GPU for an hour, None if it is not known."""

    tflops: float
    utilisation: float = UTILISATION
    price: float | None = None


def operations(found: Plan) -> float:
    """Floating-point operations of one GPU for a student update, all turns and micro-batches, with the backward passes
    and what activation checkpointing computes again. Turns whose number of network evaluations is random were run for
    the largest number, and are scaled to its mean (derived)."""
    accumulate = found.recipe.train.accumulate
    return sum(part.operations * part.turn.updates * accumulate for part in found.turns)


def cost_lines(found: Plan, speed: Speed | None) -> list[str]:
    """What `fastgen plan` says about time: operations, and with a stated speed seconds, GPU hours and price."""
    total = operations(found)
    lines = [f"A student update takes {total / 1e12:.3g} TFLOP on each GPU (matrix products and convolutions)."]
    if speed is None:
        return [*lines, "With --tflops, the speed of a GPU, the time of a run follows."]
    seconds = total / (speed.tflops * 1e12 * speed.utilisation)
    hours = seconds * found.recipe.train.steps * found.gpus / 3600
    lines.append(
        f"At {speed.utilisation:.0%} of {speed.tflops:g} TFLOP/s: {seconds:.3g} seconds an update, "
        f"{seconds * found.recipe.train.steps / 3600:.3g} hours and {hours:.3g} GPU hours for "
        f"{found.recipe.train.steps} updates, without evaluation, checkpoints, data and communication."
    )
    if speed.price is not None:
        lines.append(f"At {speed.price:g} an hour for a GPU, the run costs {hours * speed.price:,.0f}.")
    return lines
