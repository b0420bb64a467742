"""The script that makes the moving digits teacher: its interrupted training ends where an uninterrupted one ends."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import moving_digits_vae as autoencoder
import training

from fastgen.data.moving_digits import draw_scenes, render

torch.set_num_threads(1)


class Killed(Exception):
    pass


def trained(folder: Path, monkeypatch: pytest.MonkeyPatch, stop: int | None = None) -> nn.Module:
    """A small network after 12 steps in `folder`, or killed in step `stop`; a checkpoint after every step."""
    monkeypatch.setattr(training, "SAVE_SECONDS", -1)
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(16, 3))

    def losses(step: int, steps: int) -> dict[str, Tensor]:
        if step == stop:
            raise Killed
        x = torch.randn(8, 2, 4, 4)
        return {"loss": F.mse_loss(network(x), x.flatten(1)[:, :3])}

    matrices = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim == 1]
    chosen = training.optimizers(matrices, others, 0.02, 1e-2)
    return training.train(network, losses, chosen, 12, 0, folder, 0.9)


def test_a_killed_training_continues_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = trained(tmp_path / "whole", monkeypatch)
    for stop in (3, 7):
        with pytest.raises(Killed):
            trained(tmp_path / "pieces", monkeypatch, stop)
    pieces = trained(tmp_path / "pieces", monkeypatch)
    for one, other in zip(whole.parameters(), pieces.parameters(), strict=True):
        assert torch.equal(one, other)
    assert training.progress(tmp_path / "pieces")["steps"] == 12


def test_tensors_with_two_names_are_kept_once(tmp_path: Path):
    one = nn.Linear(2, 2)
    network = nn.Sequential(one, nn.Linear(2, 3), one)
    average = copy.deepcopy(network)
    training.write(tmp_path, network, average, [], 4, 60.0)
    with torch.no_grad():
        saved = [p.clone() for p in network.parameters()]
        for p in network.parameters():
            p.zero_()
    assert training.read(tmp_path, network, average, []) == (4, 60.0)
    assert all(torch.equal(*pair) for pair in zip(saved, network.parameters(), strict=True))
    assert sorted(training.own(network)) == ["0.bias", "0.weight", "1.bias", "1.weight"]


def test_muons_update_keeps_the_directions_and_levels_their_sizes():
    matrix = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    for given in (matrix, matrix.T):
        sizes = torch.linalg.svdvals(training.orthogonal(given))
        assert sizes.min() > 0.6 and sizes.max() < 1.3
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    rotated = u.T @ training.orthogonal(matrix) @ vh.T
    torch.testing.assert_close(rotated, torch.diag(rotated.diag()), atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_trainings_codec_is_the_stock_one_without_its_clamp():
    torch.manual_seed(0)
    vae = autoencoder.new_vae()
    for parameter in vae.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    video = render(draw_scenes(torch.arange(1), 0), 9).transpose(1, 2) * 2 - 1
    mean, log_variance = autoencoder.encode(vae, video)
    stock = vae.encode(video).latent_dist
    torch.testing.assert_close(mean, stock.mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(log_variance, stock.logvar, atol=1e-4, rtol=1e-4)
    again = autoencoder.decode(vae, mean)
    assert again.abs().max() > 1  # the clamp would matter
    torch.testing.assert_close(again.clamp(-1, 1), vae.decode(mean).sample, atol=1e-4, rtol=1e-4)
