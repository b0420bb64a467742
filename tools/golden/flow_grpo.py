"""Numbers of Flow-GRPO's code: its step with log-probability, its advantages and its clipped loss.

python tools/golden/flow_grpo.py CHECKOUT

The step and the advantages are functions of the repository. The loss is a part of its training loop: the statements
from the clamp of the advantages to the clipped mean are taken from the checkout."""

from types import SimpleNamespace

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from pieces import checkout_of, in_float64, module_at, normals, statements

REPOSITORY, COMMIT = "yifan123/flow_grpo", "ac4c86e8cae021841f1fde853d340e0db67690dd"
CHECKOUT = checkout_of(REPOSITORY, COMMIT)

from golden_rows import save_golden  # noqa: E402


def step() -> None:
    path = "flow_grpo/diffusers_patch/sd3_sde_with_logprob.py"
    function = module_at(CHECKOUT / path).sde_step_with_logprob
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    scheduler.sigmas = scheduler.sigmas.double()
    normal, rows = normals(0), [0, 3, 7]
    sample, velocity, x_next = (normal(3, 4, 3, 2) for _ in range(3))
    with in_float64():
        _, log_prob, mean, std = function(
            scheduler, velocity.requires_grad_(), scheduler.timesteps[rows], sample, 0.7, prev_sample=x_next
        )
    grad = torch.autograd.grad(log_prob.sum(), mean)[0]
    levels = scheduler.sigmas[rows].reshape(-1, 1, 1, 1)
    std = std * (levels - scheduler.sigmas[[i + 1 for i in rows]].reshape(-1, 1, 1, 1)).sqrt()
    tensors = {"x_next": x_next, "mean": mean, "std": std, "log_prob": log_prob, "grad": grad}
    save_golden("flow_grpo_log_prob", tensors, REPOSITORY, COMMIT, f"{path}, sde_step_with_logprob")


def advantages() -> None:
    path = "flow_grpo/stat_tracking.py"
    tracker = module_at(CHECKOUT / path).PerPromptStatTracker
    group = torch.tensor([0, 1, 2, 0, 2, 1, 1, 0, 2, 0, 1, 2, 3, 3, 3, 3])
    reward = normals(1)(16) * torch.tensor([1.0, 0.2, 3.0, 0.0])[group] + torch.tensor([0.0, 5.0, -2.0, 1.0])[group]
    for name, whole in (("batch", True), ("group", False)):
        found = torch.as_tensor(tracker(whole).update([str(g) for g in group.tolist()], reward.numpy()))
        tensors = {"reward": reward, "group": group, "advantage": found}
        function = f"{path}, PerPromptStatTracker(global_std={whole}).update"
        save_golden(f"flow_grpo_advantages_{name}", tensors, REPOSITORY, COMMIT, function)


def policy_loss() -> None:
    path = "scripts/train_sd3.py"
    code = statements(CHECKOUT / path, "advantages = torch.clamp", "if config.train.beta > 0")
    normal = normals(2)
    old, log_prob = normal(12), (normal(12) * 3e-4)
    log_prob = (old + log_prob).requires_grad_()
    sample = {"advantages": 4 * normal(12, 2), "log_probs": torch.stack([normal(12), old], 1)}
    config = SimpleNamespace(train=SimpleNamespace(adv_clip_max=5, clip_range=1e-4))
    scope = {"torch": torch, "sample": sample, "config": config, "log_prob": log_prob, "j": 1}
    exec(code, scope)
    loss = scope["policy_loss"]
    grad = torch.autograd.grad(loss, log_prob)[0]
    assert 0 < (grad == 0).sum() < 12 and sample["advantages"][:, 1].abs().max() > 5
    tensors = {"log_ratio": log_prob - old, "advantage": sample["advantages"][:, 1], "loss": loss, "grad": grad}
    save_golden("flow_grpo_policy_loss", tensors, REPOSITORY, COMMIT, f"{path}, main: the clipped loss of its loop")


if __name__ == "__main__":
    step()
    advantages()
    policy_loss()
