"""What all tests share: two threads at most, no network, and the smallest batches and recipes."""

import gc
import os

import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before diffusers imports triton: its kernels then run on the CPU

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fresh import RunFresh, fresh_processes
from torch import Tensor

from fastgen.backbones import gaussian_mixture
from fastgen.backbones.gaussian_mixture import GaussianMixtureConfig
from fastgen.backbones.point_network import PointDenoiser
from fastgen.schedule import VPSchedule

# Triton has no macOS or Windows wheels; the development extras install it on Linux
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_block_sparse_*.py"]

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name of a family -> its student in other forms (exported_students.py), which takes seconds to make."""
    from exported_students import find

    return lambda name: find(tmp_path_factory, name)


def pytest_configure() -> None:
    gc.disable()  # imports make a million objects that stay, and looking for garbage among them takes seconds


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


PROJECT = Path(__file__).resolve().parents[1]
MIXTURE_RECIPE = PROJECT / "recipes" / "mixture_dmd2_4step.yaml"


@pytest.fixture(scope="session")
def project() -> Path:
    return PROJECT


@pytest.fixture(scope="session")
def run_fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunFresh]:
    """Runs a program in a process of its own that has imported torch and nothing else of weight."""
    with fresh_processes(tmp_path_factory.mktemp("fresh")) as run:
        yield run


@pytest.fixture(scope="session")
def mixture_recipe() -> Path:
    """The path of a complete recipe that loads in milliseconds."""
    return MIXTURE_RECIPE


@pytest.fixture
def raw_recipe() -> dict[str, Any]:
    """The same recipe as plain YAML values, to be changed."""
    return yaml.safe_load(MIXTURE_RECIPE.read_text())


@pytest.fixture(scope="session")
def sd_betas() -> Tensor:
    """Stable Diffusion's scaled_linear betas, 0.00085 to 0.012 over 1000 steps, float64."""
    return torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2


@pytest.fixture(scope="session")
def vp_schedule(sd_betas: Tensor) -> VPSchedule:
    return VPSchedule((1 - sd_betas).cumprod(0))


@pytest.fixture(scope="module")
def fit_once() -> Iterator[None]:
    """The runs of one file fit the network of each mixture once. A fit depends on the configuration and the seed alone
    (test_gaussian_mixture.py), and a backbone only copies its weights."""
    fitted: dict[tuple[GaussianMixtureConfig, int], PointDenoiser] = {}
    fit = gaussian_mixture.fit

    def once(
        denoiser: PointDenoiser, mixture: gaussian_mixture.Mixture, config: GaussianMixtureConfig, seed: int
    ) -> PointDenoiser:
        if (config, seed) not in fitted:
            fitted[config, seed] = fit(denoiser, mixture, config, seed)
        return fitted[config, seed]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaussian_mixture, "fit", once)
        yield
