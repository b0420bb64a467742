"""Wan VACE (2.1 1.3B and 14B): a Wan network with a second stack of blocks, which sees a control video and whose
outputs are added to the first. Here the control is a first picture: the rest of the video is grey, and the mask asks
for it.

Other controls of VACE, such as depth or poses of a whole video and reference pictures, are not given."""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen.backbones.base import DEFAULT_ROLES, RoleOptions
from fastgen.backbones.folder import read_json
from fastgen.backbones.wan_given import GivenFrame, GivenFrameConfig
from fastgen.backbones.wan_network import GivenFrameDenoiser
from fastgen.batch import Conditioning
from fastgen.denoiser import Inputs
from fastgen.modules.inputs import WanExtraInputs

GREY = 128 / 255  # of pictures that are to be made, as in diffusers' example


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class WanVACEConfig(GivenFrameConfig):
    """The keys are those of `wan`. path: a WanVACEPipeline."""

    name: Literal["wan_vace"] = "wan_vace"  # type: ignore[assignment]

    pipelines: ClassVar[tuple[str, ...]] = ("WanVACEPipeline",)

    def check(self) -> None:
        """Also raises ValueError for a network whose control has other channels."""
        super().check()
        folder = self.local_folder()
        if folder is None:
            return
        network = read_json(folder / "transformer/config.json")
        spatial = read_json(folder / "vae/config.json").get("scale_factor_spatial", 8)
        wanted = 2 * network["out_channels"] + spatial**2
        if network["vace_in_channels"] != wanted:
            raise ValueError(f"path: its transformer has vace_in_channels {network['vace_in_channels']}, not {wanted}")

    def build(
        self, device: torch.device, dtype: torch.dtype, seed: int, roles: RoleOptions = DEFAULT_ROLES
    ) -> "WanVACE":
        return WanVACE(self, device, dtype, roles)


class WanVACEExtraInputs(WanExtraInputs):
    """WanExtraInputs where the network hands its embedder the timesteps as they are."""

    def forward(self, timestep: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        found = super().forward(timestep.flatten(), *rest, timestep_seq_len=timestep.shape[1])
        return found[0].squeeze(1), found[1].squeeze(1), *found[2:]


class WanVACEDenoiser(GivenFrameDenoiser):
    """A WanVACETransformer3DModel with the control cond["image_latents"] [B, F, 2 C + 64, H, W]."""

    extra_inputs = WanVACEExtraInputs

    def call_network(self, x_t: Tensor, t: Tensor, cond: Conditioning, inputs: Inputs) -> Tensor:
        dtype = self.network.dtype
        return self.network(
            hidden_states=x_t.transpose(1, 2).to(dtype),
            timestep=self.timestep(t, inputs),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            control_hidden_states=cond["image_latents"].transpose(1, 2).to(dtype),
            return_dict=False,
        )[0].transpose(1, 2)

    @property
    def shard_modules(self) -> list[nn.Module]:
        return [*self.network.blocks, *self.network.vace_blocks]


class WanVACE(GivenFrame):
    """The backbone of recipes with `backbone: {name: wan_vace, path: ...}`."""

    config: WanVACEConfig
    network_class = "WanVACETransformer3DModel"

    def wrap(self, network: Any) -> WanVACEDenoiser:
        return WanVACEDenoiser(network)

    @property
    def call(self) -> str:  # type: ignore[override]
        size, rest = f"({self.config.width}, {self.config.height})", self.config.num_frames - 1
        lines = super().call.replace('"a prompt", ', '"a prompt", video=frames, mask=mask, ')
        given = f"""image = load_image("picture.png").resize({size})
frames = [image, *[Image.new("RGB", {size}, (128, 128, 128))] * {rest}]
mask = [Image.new("L", {size}, 0), *[Image.new("L", {size}, 255)] * {rest}]
video ="""
        imports = "from diffusers.utils import load_image\nfrom PIL import Image\n"
        return imports + lines.replace("\nvideo =", f"\n{given}")

    def encode_image(self, pixels: Tensor) -> Conditioning:
        """image_latents [1, F, 2 C + 64, h, w]: the latents of what is given and of what is not, each with the other
        part at the middle of the range, and the mask, one for each pixel of a latent. The mask of a latent frame is
        that of one of its pictures, chosen as the stock pipeline does (nearest-exact)."""
        count = self.config.num_frames
        kept, made = (torch.full((1, count, *pixels.shape), value) for value in (0.5, GREY))
        kept[:, 0], made[:, 0] = pixels, 0.5
        latents = torch.cat([self.encode(kept), self.encode(made)], dim=2)
        frames, channels, high, wide = self.image_shapes()["image_latents"]
        mask = (torch.arange(count) > 0).float()
        rows = F.interpolate(mask[None, None], size=frames, mode="nearest-exact").to(latents.device)
        grid = rows[0, 0, :, None, None, None].expand(frames, channels - latents.shape[2], high, wide)
        return Conditioning({"image_latents": torch.cat([latents, grid[None]], dim=2).to(self.dtype)})

    def image_shapes(self) -> dict[str, tuple[int, ...]]:
        frames, _, *size = self.latent_shape
        return {"image_latents": (frames, self.network_config["vace_in_channels"], *size)}
