"""One student for several numbers of steps, where its objective taught it the levels of all of them."""

import dataclasses

from fastgen.recipe import Recipe
from fastgen.rollout import RolloutPolicy

NEAR = 0.02  # a level counts as learned if one that was trained is as near (ours; LCM's own 50 lie so far apart)


def with_steps(recipe: Recipe, num_steps: int) -> RolloutPolicy:
    """The sampler of a recipe's student with another number of steps n, at the levels k u / (1 + (k - 1) u),
    u = 1, ..., 1 / n, with the shift k of the recipe's own list.

    Raises ValueError, in words, if the objective did not teach the student these levels, or if a scheduler of the
    family cannot store them."""
    policy, learned = recipe.rollout, recipe.objective.learned_levels
    if learned == () or policy.transition != "renoise":
        raise ValueError(
            f"this student can make {policy.num_steps} steps and no others: {recipe.objective.name} trains it at its "
            "own levels; consistency (one phase) and scm with transition: renoise train it at others, too"
        )
    like_a_flow_map = dataclasses.replace(policy, transition="ode", two_time=True)
    other = dataclasses.replace(policy, timesteps=like_a_flow_map.with_steps(num_steps).timesteps)
    far = [t for t in other.timesteps if learned is not None and min(abs(t - level) for level in learned) > NEAR]
    if far:
        raise ValueError(
            f"{num_steps} steps need the level {far[0]:.4g}, and none of the {len(learned or ())} levels that this "
            "student was trained at is near; train with a larger objective.grid.count"
        )
    try:
        recipe.backbone.check_export(other)
    except ValueError as error:
        raise ValueError(f"{num_steps} steps: {error}") from None
    return other
