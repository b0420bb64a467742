"""What a turn of each role may move, which is asked of every family."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastgen.backbones.base import Backbone
from fastgen.batch import Batch
from fastgen.networks import Networks
from fastgen.objectives.base import Objective


def check_turns(objective: Objective, networks: Networks, batch: Batch, backbone: Backbone) -> None:
    """Plays every turn of the first update by gradient descent: the weights of its roles move, and those of no other
    role, nor those of the base that adapters share."""
    for turn in objective.turns(0, {}):
        before = {role: copied(module.parameters()) for role, module in networks.items()}
        base = [] if backbone.shared is None else backbone.shared.base_parameters()
        kept = copied(base)
        optimizer = torch.optim.SGD([p for role in turn.roles for p in networks[role].parameters()], lr=0.1)
        loss: Any = objective.loss(turn, networks, batch, {})
        loss.total.backward()
        optimizer.step()
        for role, module in networks.items():
            pairs = zip(before[role], module.parameters(), strict=True)
            moved = any(not torch.equal(old, new) for old, new in pairs)
            assert moved == (role in turn.roles), (turn.name, role)
        assert all(torch.equal(old, new) for old, new in zip(kept, base, strict=True)), turn.name
        for module in networks.values():
            module.zero_grad()


def copied(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]
