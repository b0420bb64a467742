"""Do the samples show what their prompts say, and not what other prompts say?"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.metrics.base import Directions, MetricContext
from fastgen.metrics.features import ClipFeatures
from fastgen.metrics.gathered import Gathered

TIE = 1e-6  # cosines that differ by less are equal: features are float32


class ClipRetrieval(Gathered):
    """The share of samples whose own prompt is, of all prompts of the evaluation, the nearest by CLIP's cosine
    (R-precision: Park et al., NeurIPS 2021 datasets track, with CLIP in place of their DAMSM). clip_retrieval_5: the
    share whose own prompt is among the five nearest. Equal prompts are one, and of prompts that are equally near the
    own is the nearest: CLIP reads some in the same way, such as those that differ in capitals. In [0, 1]; the more
    prompts there are, the lower. It needs `eval.features: clip`, and reads texts with the same CLIP."""

    name = "clip_retrieval"
    reads_prompts = True
    directions: ClassVar[Directions] = {"clip_retrieval": "higher", "clip_retrieval_5": "higher"}

    def __init__(self, context: MetricContext):
        super().__init__(context)
        if self.features.name != "clip":
            raise ValueError("clip_retrieval needs a CLIP: set eval.features to clip and eval.clip to its folder")
        self.prompts: list[str] = []

    def update(self, samples: Tensor, prompts: Sequence[str]) -> None:
        super().update(samples, prompts)
        self.prompts += prompts

    def restore(self, state: Mapping[str, Tensor], prompts: Sequence[str]) -> None:
        super().restore(state, prompts)
        self.prompts = list(prompts)

    def compute(self) -> dict[str, float]:
        network = self.features.network
        assert isinstance(network, ClipFeatures)
        unique = list(dict.fromkeys(self.prompts))
        own = torch.tensor([unique.index(prompt) for prompt in self.prompts])
        pictures = F.normalize(torch.cat(self.generated).double(), dim=1)
        cosine = pictures @ network.clip.text(unique).double().cpu().T
        nearer = (cosine > cosine.gather(1, own[:, None]) + TIE).sum(1)
        shares = [float((nearer < most).double().mean()) for most in (1, 5)]
        return dict(zip(self.directions, shares, strict=True))
