"""Numbers of Reward Forcing's Re-DMD (JaydenLyh/Reward-Forcing), for tests/golden_video_dmd.py.

python tools/golden/reward_forcing.py CHECKOUT

The model is made as in self_forcing.py, on whose code theirs is built; its reward model gives a number of ours."""

import sys
import types

import torch
from called import called_with, checkout_of, gradients_of, normal, package, stub
from golden_rows import GoldenNetwork, save_golden
from self_forcing import BATCH, FRAMES, SHAPE, dmd_model

REPOSITORY, COMMIT = "JaydenLyh/Reward-Forcing", "4317f5a0d29d1cee6a0f2e80ed5f5724bee97c66"


def main() -> None:
    package("model", checkout_of(REPOSITORY, COMMIT) / "model")
    stub("wan", "wan.modules", "wan.modules.model", "wan.modules.t5", "wan.modules.vae", "wan.modules.tokenizers")
    stub("wan.modules.causal_model", "einops", "pipeline", "model.base")
    sys.modules["model.base"].RewardForcingModel = torch.nn.Module  # type: ignore[attr-defined]
    from model.re_dmd import ReDMD

    networks = {"student": GoldenNetwork(0), "teacher": GoldenNetwork(1), "fake_score": GoldenNetwork(2)}
    noise, cond, uncond = normal(0, BATCH, FRAMES, *SHAPE), normal(1, BATCH, 4), normal(2, BATCH, 4)
    reward = torch.tensor(0.37, dtype=torch.float64)
    made = dmd_model(ReDMD, networks)
    made.inferencer = types.SimpleNamespace(reward_from_frames=lambda *_, **__: {"MQ": reward})
    drawn = torch.tensor([333])
    made._get_timestep = lambda *_, **__: drawn[:, None].repeat(1, FRAMES)
    _, x = made.generator(noise, {"embedding": cond}, torch.full((BATCH, FRAMES), 1000.0))
    fresh = normal(3, BATCH, FRAMES, *SHAPE)
    with called_with([fresh]):
        both = {"embedding": cond}, {"embedding": uncond}
        loss, _ = made.compute_rewarded_distribution_matching_loss(x, noise, [""], *both, beta=2.0)
    given = {"initial": noise, "cond": cond, "uncond": uncond, "drawn": drawn, "noise": fresh, "reward": reward}
    given |= {"loss": loss, "gradient": gradients_of(networks["student"], loss)}
    function = "model/re_dmd.py, ReDMD.compute_rewarded_distribution_matching_loss"
    save_golden("re_dmd_generator", given, REPOSITORY, COMMIT, function)


if __name__ == "__main__":
    main()
