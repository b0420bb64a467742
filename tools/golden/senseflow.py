"""Numbers of SenseFlow's implicit distribution alignment (XingtongGe/SenseFlow), for tests/golden_dmd.py.

python tools/golden/senseflow.py CHECKOUT

It is part of the training loop: the statement `if self.ida_w != 1.0` is taken from the trainer at run time, and run
with two GoldenNetworks as the student and the fake score."""

import ast
import types

import torch
from called import checkout_of
from golden_rows import GoldenNetwork, save_golden
from torch import Tensor

REPOSITORY, COMMIT = "XingtongGe/SenseFlow", "f7da31b7f84d8137202e4a05ee8a436d89c1fb77"
FILE, DECAY = "senseflow/trainer/trainer_sd35_senseflow.py", 0.97


def flat(network: GoldenNetwork) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def main() -> None:
    tree = ast.parse((checkout_of(REPOSITORY, COMMIT) / FILE).read_text())
    update = next(
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "self.ida_w != 1.0"
    )
    student, fake = GoldenNetwork(0), GoldenNetwork(2)
    trainer = types.SimpleNamespace(model=student, guidance_model=types.SimpleNamespace(fake_unet=fake), ida_w=DECAY)
    exec(compile(ast.Module([update], []), FILE, "exec"), {"torch": torch, "self": trainer})
    given = {"decay": torch.tensor(DECAY, dtype=torch.float64), "weights": flat(fake)}
    save_golden("senseflow_ida", given, REPOSITORY, COMMIT, f"{FILE}, Trainer (its update of the fake score)")


if __name__ == "__main__":
    main()
