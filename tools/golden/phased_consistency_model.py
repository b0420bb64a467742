"""PCM's numbers: python tools/golden/phased_consistency_model.py CHECKOUT

CHECKOUT: of G-U-N/Phased-Consistency-Model. Its losses for SD3 are statements of a training loop, which are taken from
it at run time (`extract`) and executed with networks of ours; so are the two losses of its discriminator, with heads
of ours. Its solver is given a uniform grid that begins at 0. Casts to float32 are read as casts to float64."""

import contextlib
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy
import torch
import torch.nn.functional as F
from extract import Given, commit, defined, statements
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from golden_rows import WIDTH, GoldenNetwork, save_golden

from fastgen.modules.heads import TokenHeads

CHECKOUT = Path(sys.argv[1])
FILE, HEADS = (f"code/text_to_image_sd3/{name}.py" for name in ("train_pcm_lora_sd3_adv", "discriminator_sd3"))
SIZES = ((2, 2), (4, 8))  # 16 and 128 elements


class Transformer:
    """A GoldenNetwork as the training loop calls its transformers."""

    def __init__(self, seed: int):
        self.network = GoldenNetwork(seed)

    def __call__(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **options: Any) -> Any:
        out = self.network(hidden_states, timestep, encoder_hidden_states)
        return (out,) if "return_dict" in options else SimpleNamespace(sample=out)


def discriminator(network: GoldenNetwork) -> Any:
    """Their two losses, of one head of ours on the features of a frozen network."""
    torch.manual_seed(5)
    heads = TokenHeads(WIDTH, 1, hidden=8).double()
    self = SimpleNamespace(head_num=1, num_h_per_head=1, heads=heads)
    self._forward = lambda x, t, cond, _: [heads([network.hidden(x, t, cond).flatten(2).mT])]
    kinds = {
        name: partial(defined(CHECKOUT / HEADS, f"Discriminator.{name}", {"torch": torch}), self)
        for name in ("d_loss", "g_loss")
    }
    found = lambda kind, *inputs: kinds[kind](*inputs)  # noqa: E731
    found.heads = heads  # type: ignore[attr-defined]
    return found


def draws(size: tuple[int, int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(size))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    names = ("latents", "noise", "gan_noise", "gan_real_noise")
    given = {name: normal(4, 4, *size) for name in names} | {"cond": normal(4, 4), "uncond": normal(4, 4)}
    return given | {"index": torch.tensor([0, 3, 5, 7]), "adversarial_index": torch.tensor([1, 4, 6, 2])}


def turn(given: dict[str, Tensor], phases: int) -> dict[str, Any]:
    """Executes an update of their loop with 8 levels in this many phases. Returns all of its variables."""
    indices = list(given["adversarial_index"][:, None]) if phases == 1 else list(given["index"][:, None])
    drawn = {"randint": indices, "randn_like": [given["gan_real_noise"], given["gan_noise"]]}
    variables: dict[str, Any] = {
        "torch": Given(torch, autocast=lambda *_, **__: contextlib.nullcontext(), **drawn),
        "np": numpy,
        "F": F,
        "noise_scheduler": SimpleNamespace(config=SimpleNamespace(num_train_timesteps=1)),
        "model_input": given["latents"],
        "noise": given["noise"],
        "index": given["index"],
        "bsz": 4,
        "prompt_embeds": given["cond"],
        "uncond_prompt_embeds": given["uncond"],
        "weight_dtype": torch.float64,
        "transformer": Transformer(1),
        "teacher_transformer": Transformer(2),
    }
    variables |= {"pooled_prompt_embeds": given["cond"], "uncond_pooled_prompt_embeds": given["uncond"]}
    options = {"multiphase": phases, "num_euler_timesteps": 8, "not_apply_cfg_solver": False}
    variables["args"] = SimpleNamespace(**options, loss_type="huber", huber_c=1e-3, adv_weight=0.1)
    for name in ("extract_into_tensor", "EulerSolver"):
        defined(CHECKOUT / FILE, name, variables)
    # every second of 16 levels is on the grid, and the first is where it begins
    levels = numpy.arange(1, 17) / 16
    levels[0] = 0.0
    variables["solver"] = variables["EulerSolver"](levels, timesteps=16, euler_timesteps=8)
    variables["discriminator"] = discriminator(variables["teacher_transformer"].network)
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        exec(statements(CHECKOUT / FILE, "sigmas = extract_into_tensor", "if global_step % 2"), variables)
        exec(statements(CHECKOUT / FILE, "loss = discriminator('d_loss'", "accelerator.backward"), variables)
        variables["d_loss"] = variables["loss"]
        exec(statements(CHECKOUT / FILE, "if args.loss_type", "loss += g_loss"), variables)
    return variables


def gradient(variables: dict[str, Any], name: str) -> Tensor:
    network = variables["transformer"].network
    network.zero_grad()
    variables[name].backward(retain_graph=True)
    return network.flat()  # type: ignore[no-any-return]


def main() -> None:
    tensors, ratios = dict[str, Tensor](), list[Tensor]()
    for i, size in enumerate(SIZES):
        given = draws(size)
        found = turn(given, phases=1)
        ratios.append(gradient(found, "g_loss").norm() / gradient(found, "loss").norm())
        tensors |= {f"{name}{i}": value for name, value in given.items() if name != "gan_real_noise"}
    save = partial(save_golden, repository="G-U-N/Phased-Consistency-Model", commit=commit(CHECKOUT))
    save(
        "pcm_ratio", tensors | {"ratio": torch.stack(ratios)}, function=f"{FILE}, main; {HEADS}, Discriminator.g_loss"
    )
    given = draws(SIZES[0])
    found = turn(given, phases=1)
    found["d_loss"].backward()
    heads = torch.cat([p.grad.flatten() for p in found["discriminator"].heads.parameters()])
    results = {"gradient": heads, "loss": found["d_loss"]}
    save("pcm_discriminator", given | results, function=f"{FILE}, main; {HEADS}, Discriminator.d_loss")
    found = turn(given, phases=2)
    used = {name: given[name] for name in ("latents", "noise", "cond", "uncond", "index")}
    results = {"gradient": gradient(found, "loss"), "loss": found["loss"]}
    save("pcm_loss", used | results, function=f"{FILE}, main, EulerSolver")


if __name__ == "__main__":
    main()
