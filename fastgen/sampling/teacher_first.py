"""The teacher makes the first steps of a sample and the student the rest.

A distilled student settles the layout of a sample in its first step, and that is where it has lost its teacher's
diversity. With the teacher in the place of that step, diversity comes back, and most of the speed stays  (Distilling
Diversity and Control in Diffusion Models, arXiv 2503.10637). Nothing is trained."""

from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from fastgen.batch import Conditioning
from fastgen.rollout import RolloutPolicy, TeacherPolicy
from fastgen.rollout.passes import Noise
from fastgen.sampling.sampler import Routed, Sampler

ROUNDING = 1e-6  # levels that differ by less are the same


class TeacherFirst(Sampler):
    """A student's sampler whose first `first` steps the teacher makes instead.

        x_T -> teacher, on its own grid -> x at t = timesteps[first] -> student, from step `first` -> x0

    teacher: its sampler, with its number of steps, those of a whole sample, and its guidance; of these steps, it makes
    those above t. The last one ends at t exactly (the authors' code ends at the teacher's level that is nearest to t).
    With first = 0 this is the student's sampler, and with first = student.policy.num_steps the teacher's.

    Raises ValueError for another `first`, for a student that works in chunks, and for several students."""

    def __init__(self, student: Sampler, teacher: Sampler, first: int):
        policy = student.policy
        check_first(policy, first)
        super().__init__(student.backbone, student.denoiser, policy, student.guidance_scale, student.weights_folder)
        if isinstance(student, Routed):
            raise ValueError("the teacher cannot make the first steps of several students at once; name one of them")
        self.part = student.part
        self.original, self.first, self.teacher, self.rest = teacher, first, teacher, student
        if 0 < first < policy.num_steps:
            self.teacher = teacher.with_policy(until(teacher.policy, policy.timesteps[first]))
            self.rest = student.with_policy(replace(policy, timesteps=policy.timesteps[first:]))

    @property
    def parts(self) -> list[Sampler]:
        """The samplers that a sample goes through, in order."""
        return [self.teacher] * (self.first > 0) + [self.rest] * (self.first < self.policy.num_steps)

    @property
    def network_evaluations(self) -> int:
        return sum(part.network_evaluations for part in self.parts)

    @property
    def levels(self) -> list[float]:
        return [level for part in self.parts for level in part.levels]

    def run(self, cond: Conditioning, uncond: Conditioning, noise: Noise, seen: list[Tensor] | None = None) -> Tensor:
        for part in self.parts:
            noise = begun(part.run(cond, uncond, noise, seen), noise)
        return noise("initial")

    def facts(self) -> dict[str, Any]:
        if not self.first:
            return super().facts()
        scale = self.teacher.guidance_scale
        return super().facts() | {
            "teacher_first": {
                "student_steps": self.first,
                "timesteps": list(self.teacher.policy.timesteps),
                "guidance_scale": float(scale) if isinstance(scale, int | float) else list(scale),
                "weights": self.teacher.weight_hashes(),
            }
        }


def check_first(policy: RolloutPolicy, first: int) -> None:
    """Raises ValueError if a teacher cannot make the first `first` steps of a student's sampler."""
    if first and policy.chunks is not None:
        raise ValueError("the teacher cannot make the first steps of a student that works chunk by chunk")
    if not 0 <= first <= policy.num_steps:
        raise ValueError(f"the teacher is to make the first {first} steps of a student that has {policy.num_steps}")


def until(policy: RolloutPolicy, level: float) -> TeacherPolicy:
    """The steps of a teacher's sampler that begin above `level`; the last one is cut there. Raises ValueError if there
    are none."""
    timesteps = tuple(t for t in policy.timesteps if t > level + ROUNDING)
    if not timesteps:
        raise ValueError(
            f"the teacher begins at level {policy.timesteps[0]:g}, below level {level:g}, where the student goes on"
        )
    kept = {field.name: getattr(policy, field.name) for field in fields(policy)}
    return TeacherPolicy(**{**kept, "timesteps": timesteps, "final_level": level})


def begun(x: Tensor, noise: Noise) -> Noise:
    """The same draws, for a sampler that begins at x."""
    return lambda name: x if name == "initial" else noise(name)
