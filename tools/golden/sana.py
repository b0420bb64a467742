"""SANA-Sprint's numbers: python tools/golden/sana.py CHECKOUT

CHECKOUT: a fork of NVlabs/Sana at the commit that the files name, as the original is large; the statements are the
same. Its sCM and adversarial losses are statements of a training loop, which are taken from it at run time (`extract`)
and executed with networks and tensors of ours: the student's and the discriminator's turn. For samples of two sizes.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from extract import Given, commit, defined, statements
from torch import Tensor
from trig_networks import flow_state, trig_velocity

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from golden_rows import WIDTH, GoldenNetwork, save_golden

from fastgen.modules.heads import TokenHeads

CHECKOUT = Path(sys.argv[1])
TRAIN = "train_scripts/train_scm_ladd.py"
REPOSITORY, COMMIT = "xin-ran-w/Sana", commit(CHECKOUT)
SIZES = ((2, 2), (4, 8))  # 16 and 128 elements
SIGMA_DATA, GUIDANCE = 0.5, 4.5


def draws(size: tuple[int, int]) -> dict[str, Tensor]:
    """Four samples and everything that is drawn for them. Angles are given as the uniform draws of their laws."""
    generator = torch.Generator().manual_seed(sum(size))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    noises = {name: normal(4, 4, *size) for name in ("latents", "noise", "gan_noise", "gan_fake_noise")}
    noises |= {name: normal(4, 4, *size) for name in ("gan_real_noise", "gan_other_noise")}
    kinds = ("time", "max_time", "gan_time", "gan_fake_time", "gan_real_time", "gan_other_time")
    levels = {name: torch.rand(4, generator=generator, dtype=torch.float64) for name in kinds}
    return noises | levels | {"cond": normal(4, 4), "uncond": normal(4, 4)}


class Trig:
    """A network as the training loop calls it. logvar: what SANA-Sprint's head gives, a + b t."""

    def __init__(self, seed: int, logvar: tuple[float, float] = (0.0, 0.0)):
        self.network, self.logvar = GoldenNetwork(seed), logvar

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, return_logvar: bool = False, **_: Any) -> Any:
        out = trig_velocity(self.network, x, t, y)
        return (out, self.logvar[0] + self.logvar[1] * t) if return_logvar else out

    def train(self) -> None: ...

    eval = train


class Discriminator:
    """Heads of ours on the features of a frozen network."""

    def __init__(self, network: GoldenNetwork):
        torch.manual_seed(5)
        self.network, self.heads = network, TokenHeads(WIDTH, 1, hidden=8).double()

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, **_: Any) -> Tensor:
        x_flow, level = flow_state(x, t)
        return self.heads([self.network.hidden(x_flow, level, y).flatten(2).mT])

    def train(self) -> None: ...

    eval = train


def angles(u: Tensor, mean: float, std: float) -> Tensor:
    """Their law of levels, for the normal draws that belong to our uniform ones."""
    given = {"randn": [torch.special.ndtri(u)]}
    path = CHECKOUT / "diffusion/model/respace.py"
    law = defined(path, "compute_density_for_timestep_sampling", {"th": Given(torch, **given)})
    return law("logit_normal_trigflow", len(u), mean, std)  # type: ignore[no-any-return]


def settings() -> SimpleNamespace:
    train = SimpleNamespace(
        scm_loss=True,
        scm_cfg_scale=[GUIDANCE],
        tangent_warmup_steps=4000,
        train_largest_timestep=True,
        largest_timestep=torch.pi / 2,
        largest_timestep_prob=0.5,
        discriminator_loss="hinge",
        scm_lambda=1,
        adv_lambda=0.5,
        gradient_accumulation_steps=1,
        diff_timesteps_D=True,
        misaligned_pairs_D=True,
        r1_penalty=False,
    )
    laws = {"logit_mean": 0.2, "logit_std": 1.6, "logit_mean_discriminator": -0.6, "logit_std_discriminator": 1.0}
    names = ("weighting_scheme", "weighting_scheme_discriminator")
    scheduler = SimpleNamespace(**laws, **dict.fromkeys(names, "logit_normal_trigflow"))
    return SimpleNamespace(train=train, scheduler=scheduler, model=SimpleNamespace(cfg_embed=True))


def turn(given: dict[str, Tensor], phase: str) -> dict[str, Any]:
    """Executes one turn of their loop: G to the sum of its terms, D to its loss. Returns all of its variables."""
    student, teacher = Trig(1, (0.3, -0.8)), Trig(2)
    discriminator = Discriminator(teacher.network)
    t = angles(given["time"], 0.2, 1.6).view(-1, 1, 1, 1)
    x0 = SIGMA_DATA * given["latents"]
    later = ["time", "gan_time"] if phase == "G" else ["gan_fake_time", "gan_real_time", "gan_other_time"]
    noises = ["noise", "gan_noise"] if phase == "G" else ["noise", "gan_fake_noise", "gan_real_noise"]
    noises += ["gan_other_noise"] if phase == "D" else []
    laws = [(angles(given[name], *((0.2, 1.6) if name == "time" else (-0.6, 1.0))), None) for name in later]
    variables: dict[str, Any] = {
        "torch": Given(
            torch,
            randn_like=[given[name].clone() for name in noises],
            rand_like=[given["max_time"].view(-1, 1, 1, 1)],
        ),
        "get_timesteps": lambda **_: laws.pop(0),
        "accelerator": SimpleNamespace(unwrap_model=lambda module: module),
        "np": SimpleNamespace(random=SimpleNamespace(choice=lambda *_, **__: [GUIDANCE] * 4)),
        "scm_cfg_scale": torch.full((4,), GUIDANCE, dtype=torch.float64),
        "uncond_y": given["uncond"],
        "x_t": torch.cos(t) * x0 + torch.sin(t) * SIGMA_DATA * given["noise"],
        "model_kwargs": {"y": given["cond"]},
    }
    variables |= {"F": F, "config": settings(), "model": student, "pretrained_model": teacher, "disc": discriminator}
    variables |= {"t": t, "t_G": t, "x0": x0, "y": given["cond"], "y_mask": given["cond"], "data_info": {}, "bs": 4}
    variables |= {"sigma_data": SIGMA_DATA, "global_step": 2000}
    path = CHECKOUT / TRAIN
    if phase == "G":
        exec(statements(path, "def model_wrapper", "if g_step"), variables)
        exec(statements(path, "if config.train.scm_loss", "total_loss = total_loss /"), variables)
    else:
        exec(statements(path, "with torch.no_grad():\n    scm_cfg_scale", "loss_D = loss_D /"), variables)
    return variables


def student_gradient(variables: dict[str, Any], loss: Tensor) -> Tensor:
    network = variables["model"].network
    network.zero_grad()
    loss.backward(retain_graph=True)
    return network.flat()  # type: ignore[no-any-return]


def main() -> None:
    tensors, gradients = dict[str, Tensor](), list[list[Tensor]]()
    for index, size in enumerate(SIZES):
        given = draws(size)
        found = turn(given, "G")
        gradients.append([student_gradient(found, found[name]) for name in ("loss", "adv_loss", "total_loss")])
        used = ("latents", "noise", "gan_noise", "time", "max_time", "gan_time", "cond", "uncond")
        tensors |= {f"{name}{index}": given[name] for name in used}
        if not index:
            first, losses = given, {"loss": found["loss"], "adversarial_loss": found["adv_loss"]}
    scm, adversarial, total = gradients[0]

    def save(name: str, values: dict[str, Tensor], path: str = TRAIN, function: str = "train, phase G") -> None:
        save_golden(name, values, REPOSITORY, COMMIT, f"{path}, {function}")

    save("sana_scm", first | {"gradient": scm, "loss": losses["loss"]})
    save("sana_adversarial", first | {"gradient": adversarial, "loss": losses["adversarial_loss"], "total": total})
    ratios = [pair[1].norm() / pair[0].norm() for pair in gradients]
    save("sana_ratio", tensors | {"ratio": torch.stack(ratios)})
    found = turn(first, "D")
    found["loss_D"].backward()
    heads = torch.cat([p.grad.flatten() for p in found["disc"].heads.parameters()])
    save("sana_discriminator", first | {"gradient": heads, "loss": found["loss_D"]}, function="train, phase D")
    u = torch.linspace(0.01, 0.99, 25, dtype=torch.float64)
    laws = {name: angles(u, *law) for name, law in (("student", (0.2, 1.6)), ("discriminator", (-0.6, 1.0)))}
    path, function = "diffusion/model/respace.py", "compute_density_for_timestep_sampling"
    save("sana_levels", {"u": u} | laws, path, function)


if __name__ == "__main__":
    main()
