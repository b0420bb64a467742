"""Write assets/digits/digits.safetensors, the pictures that the digits teacher was trained on and is measured against.

    python tools/make_digits_data.py

They are scikit-learn's 1,797 handwritten digits, divided by its stratified split with seed 0 into 1,198 to train on
and 599 that nothing is ever trained on. Stored, they need no scikit-learn where fastgen is installed. Needs the extra
`dev`."""

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from fastgen.data.digits import DATA, HELD_OUT

SPLIT_SEED = 0


def tensors() -> dict[str, torch.Tensor]:
    """<split>.images [N, 8, 8] uint8 from 0 to 16, and <split>.labels [N] uint8."""
    data = load_digits()
    order = np.arange(len(data.target))
    train, test = train_test_split(order, test_size=HELD_OUT, stratify=data.target, random_state=SPLIT_SEED)
    found = {}
    for split, chosen in (("train", train), ("test", test)):
        found[f"{split}.images"] = torch.tensor(data.images[chosen], dtype=torch.uint8)
        found[f"{split}.labels"] = torch.tensor(data.target[chosen], dtype=torch.uint8)
    return found


if __name__ == "__main__":
    save_file(tensors(), DATA)
