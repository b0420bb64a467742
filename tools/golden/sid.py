"""Numbers of SiD's and SiDA's losses (mingyuanzhou/SiD, branch sida), for tests/golden_sid.py.

python tools/golden/sid.py CHECKOUT

Their denoisers take x + sigma n and sigma. Here they are GoldenNetworks that predict the flow at x_t = (x + sigma n) /
(1 + sigma), t = sigma / (1 + sigma), and the discriminator's map is the mean over channels of their features. SiDA's
functions are called for one sample at a time, because they multiply means over the batch."""

import sys
import types
from typing import Any

import torch
from checkout import checkout_of
from draws import Float64, GivenDraws, Random
from golden_rows import GoldenNetwork
from torch import Tensor

CHECKOUT = checkout_of("mingyuanzhou/SiD", "a5510fdfb1b2d4ec6e47335a69d375dfefd7a63a")
BATCH, SHAPE = 4, (4, 2, 3)


class Scored:
    """A GoldenNetwork as a denoiser of SiDA: what `return_flag` asks for."""

    def __init__(self, network: GoldenNetwork):
        self.network = network

    def __call__(
        self, x: Tensor, sigma: Tensor, labels: Tensor, augment_labels: Any = None, return_flag: str = "decoder"
    ) -> Any:
        x_t, t = x / (1 + sigma), (sigma / (1 + sigma)).reshape(-1)
        logits = self.network.hidden(x_t, t, labels).mean(1, keepdim=True)
        if return_flag == "encoder":
            return logits
        x0 = x_t - t[:, None, None, None] * self.network(x_t, t, labels)
        return x0 if return_flag == "decoder" else (x0, logits)


def level(sigma: Tensor) -> Tensor:
    return (sigma / (1 + sigma)).reshape(-1)


def main() -> None:
    persistence: Any = types.ModuleType("torch_utils.persistence")
    persistence.persistent_class = lambda cls: cls
    package: Any = types.ModuleType("torch_utils")
    package.persistence = persistence
    sys.modules |= {"torch_utils": package, "torch_utils.persistence": persistence}
    path, adversarial = "training/sid_loss.py", "sida_training/sida_loss.py"
    sid, sida = CHECKOUT.module(path).SID_EDMLoss(), CHECKOUT.module(adversarial).SIDA_EDMLoss()

    x, noise, cond = Random(0).normal(BATCH, *SHAPE), Random(1).normal(BATCH, *SHAPE), Random(2).normal(BATCH, 4)
    u, initial, real = Random(3).uniform(BATCH), Random(4).normal(BATCH, *SHAPE), Random(5).normal(BATCH, *SHAPE)
    student, teacher, fake = (GoldenNetwork(seed) for seed in range(3))
    one = torch.ones(BATCH, dtype=torch.float64)
    sigma = (80 ** (1 / 7) + (1 - 0.8 * u) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    given = {"noise": noise, "cond": cond, "t": level(sigma), "initial": initial}

    def sample(rows: slice) -> Tensor:
        return initial[rows] - student(initial[rows], one[rows], cond[rows])

    for alpha in (1.0, 1.2):
        with Float64(), GivenDraws([noise], [u]):
            loss = sid.generator_loss(Scored(teacher), Scored(fake), sample(slice(None)), cond, alpha=alpha).sum()
        tensors = given | {"loss": loss, "gradient": student.gradient(loss)}
        name = "sid_generator" if alpha == 1 else "sid_generator_alpha"
        CHECKOUT.save(name, tensors, f"{path}, SID_EDMLoss.generator_loss")

    total = torch.zeros((), dtype=torch.float64)
    for i in range(BATCH):
        row, made = slice(i, i + 1), sample(slice(i, i + 1))
        with Float64(), GivenDraws([noise[row]], [u[row]]):
            loss, gan = sida.generator_share_encoder_loss(Scored(teacher), Scored(fake), made, cond[row], alpha=1.0)
        gan = gan.mean() * made[0].numel()  # as their training loop has it
        total = total + 0.5 * 100 * loss.sum() + 0.5 * 0.01 * gan
    tensors = given | {"loss": total, "gradient": student.gradient(total)}
    source = (
        f"{adversarial}, SIDA_EDMLoss.generator_share_encoder_loss; sida_training/sida_training_loop.py (its weights)"
    )
    CHECKOUT.save("sida_generator", tensors, source)

    total, found = torch.zeros((), dtype=torch.float64), []
    normal = Random(6).normal(BATCH)
    level_sigma = (1.2 * normal - 1.2).exp()
    for i in range(BATCH):
        row = slice(i, i + 1)
        with Float64(), GivenDraws([normal[row], noise[row]]):
            _, gan = sida.fakescore_discriminator_share_encoder_loss(
                Scored(fake), x[row], cond[row], real_images=real[row]
            )
        weight = (level_sigma[i] ** 2 + 0.25) / (0.5 * level_sigma[i]) ** 2
        found.append(gan.sum() / weight)  # without the weight of the level
    total = torch.stack(found).sum()
    tensors = {"x": x, "real": real, "noise": noise, "cond": cond, "t": level(level_sigma), "loss": total}
    tensors["gradient"] = fake.gradient(total)
    source = f"{adversarial}, SIDA_EDMLoss.fakescore_discriminator_share_encoder_loss"
    CHECKOUT.save("sida_discriminator", tensors, source)


if __name__ == "__main__":
    main()
