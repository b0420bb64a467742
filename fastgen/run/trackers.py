"""The experiment trackers that a run writes to beside its own log.jsonl, through accelerate's interfaces of them."""

import uuid
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image

MOST_PIXELS = 1600  # of a picture's longer side in TensorBoard, where every picture is kept in one file
PROJECT = "fastgen"  # of wandb and trackio; WANDB_PROJECT and the like are those libraries' own affair
RUN_ID = "tracker_id"  # in the run's folder: the name under which wandb and trackio know it


class Trackers:
    """names: those of `train.trackers`. folder: the run's. step: the last update of the checkpoint that the run
    continues from; what TensorBoard holds of later ones is dropped. wandb and trackio add to the same run, and keep
    what they were told of later updates."""

    def __init__(self, names: Sequence[str], folder: Path, step: int):
        PartialState()  # which trackers and their loggers ask for the first process
        self.kinds: dict[str, GeneralTracker] = {name: opened(name, folder, step) for name in names}
        for tracker in self.kinds.values():
            tracker.start()

    def describe(self, recipe: Mapping[str, Any]) -> None:
        """Says what is trained. TensorBoard has no place for it beside the run's own recipe.yaml."""
        for name, tracker in self.kinds.items():
            if name != "tensorboard":
                tracker.store_init_configuration(dict(recipe))

    def record(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in self.kinds.values():
            tracker.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: Path, prompts: Sequence[str]) -> None:
        """A picture, a PNG file. The prompts of its parts are its caption where a tracker has captions; in TensorBoard
        they are those that are drawn into it."""
        caption = "\n".join(prompts)
        for kind, tracker in self.kinds.items():
            if kind == "tensorboard":
                tracker.log_images({name: reduced(path)[None]}, step=step, dataformats="NHWC")
            else:
                tracker.log({name: import_module(kind).Image(str(path), caption=caption)}, step=step)

    def finish(self) -> None:
        for tracker in self.kinds.values():
            tracker.finish()


def opened(name: str, folder: Path, step: int) -> GeneralTracker:
    """A run that is continued has the name or the id that it had before."""
    cls, run = LOGGER_TYPE_TO_CLASS[name], folder.resolve().name
    if name == "tensorboard":
        return cls("tensorboard", str(folder), purge_step=step + 1)
    if name == "trackio":
        return cls(PROJECT, name=f"{run}-{run_id(folder)[:8]}", resume="allow")
    return cls(PROJECT, name=run, id=run_id(folder), resume="allow", dir=str(folder))


def run_id(folder: Path) -> str:
    """Made when the run first needs it, and kept in its folder."""
    path = folder / RUN_ID
    if not path.is_file():
        path.write_text(uuid.uuid4().hex)
    return path.read_text()


def reduced(path: Path) -> np.ndarray:
    """[H, W, 3] uint8, at most MOST_PIXELS wide and high."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    image.thumbnail((MOST_PIXELS, MOST_PIXELS))
    return np.asarray(image)
