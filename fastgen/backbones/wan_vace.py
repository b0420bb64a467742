"""Wan VACE (2.1 1.3B and 14B): a Wan network with a second stack of blocks, which sees a control video and whose
outputs are added to the first.

The control is a given first picture, with the rest grey and a mask that asks for it; or, with `control: video`, any
video with its mask, such as depth, poses or a part to fill in, and reference pictures. References are latent frames
before the video's own: the network denoises them too, and decoding leaves them out."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from fastgen.backbones.base import DEFAULT_ROLES, RoleOptions
from fastgen.backbones.folder import read_json
from fastgen.backbones.given import Control, to_picture
from fastgen.backbones.wan_given import GivenFrame, GivenFrameConfig
from fastgen.backbones.wan_network import GivenFrameDenoiser
from fastgen.batch import Conditioning
from fastgen.denoiser import Inputs
from fastgen.modules.inputs import WanExtraInputs

GREY = 128 / 255  # of pictures that are to be made, as in diffusers' example
MOST_REFERENCES = 16  # ours


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class WanVACEConfig(GivenFrameConfig):
    """The other keys are those of `wan`. path: a WanVACEPipeline. control: what samples are made from, a first picture
    or a control video. references: the number of reference pictures of each control video."""

    name: Literal["wan_vace"] = "wan_vace"  # type: ignore[assignment]
    control: Literal["first_picture", "video"] = "first_picture"
    references: int = Field(default=0, ge=0, le=MOST_REFERENCES)

    pipelines: ClassVar[tuple[str, ...]] = ("WanVACEPipeline",)

    @property
    def takes_control(self) -> bool:
        return self.control == "video"

    @property
    def encodes_data(self) -> bool:  # type: ignore[override]
        """Real videos have no latent frames of reference pictures."""
        return self.references == 0

    def with_control(self, references: int) -> "WanVACEConfig":
        return replace(self, control="video", references=references)

    def check(self) -> None:
        """Also raises ValueError for a network whose control has other channels, and for references of a picture."""
        super().check()
        if self.references and not self.takes_control:
            raise ValueError("references: they go with control videos; set control: video, or leave references out")
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
    block_lists: ClassVar[Mapping[str, str]] = {}

    def wrap(self, network: Any) -> WanVACEDenoiser:
        return WanVACEDenoiser(network)

    @property
    def call(self) -> str:  # type: ignore[override]
        config, size = self.config, f"({self.config.width}, {self.config.height})"
        imports, given = "from diffusers.utils import load_image\nfrom PIL import Image\n", "video=frames, mask=mask, "
        if config.takes_control:
            imports = f"from diffusers.utils import load_{'image, load_' if config.references else ''}video\n"
            lines = f"""# mask=[...] may have as many pictures: white where pixels are made, black where they are kept
frames = [frame.resize({size}) for frame in load_video("control.mp4")[:{config.num_frames}]]
"""
            given = "video=frames, "
            if config.references:
                files = ", ".join(f'"reference{i}.png"' for i in range(config.references))
                lines += f"references = [load_image(file) for file in [{files}]]\n"
                given += "reference_images=references, "
        else:
            rest = config.num_frames - 1
            lines = f"""image = load_image("picture.png").resize({size})
frames = [image, *[Image.new("RGB", {size}, (128, 128, 128))] * {rest}]
mask = [Image.new("L", {size}, 0), *[Image.new("L", {size}, 255)] * {rest}]
"""
        stock = super().call.replace('"a prompt", ', f'"a prompt", {given}')
        return imports + stock.replace("\nvideo =", f"\n{lines}video =")

    @cached_property
    def latent_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """With the references' latent frames first."""
        frames, *rest = super().latent_shape
        return (self.config.references + frames, *rest)

    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        return super().decode(latents[:, self.config.references :], clamp)

    def encode_image(self, pixels: Tensor) -> Conditioning:
        """The control of a first picture: grey frames after it, all of which are to be made."""
        frames = torch.full((self.config.num_frames, *pixels.shape), GREY, device=pixels.device)
        mask = torch.ones(len(frames), *pixels.shape[1:], device=pixels.device)
        frames[0], mask[0] = pixels, 0
        return self.encode_control(Control(frames, mask))

    def encode_control(self, control: Control) -> Conditioning:
        """image_latents [1, R + F, 2 C + 64, h, w]: the latents of what is kept and of what is to be made, each with
        the other part at the middle of the range, and the mask, one for each pixel of a latent. The mask of a latent
        frame is that of one of its pictures, chosen as the stock pipeline does (nearest-exact). Of a reference, the
        first are its latents, and the others zero; the last reference comes first.

        Raises ValueError for another number of references than the section says."""
        if len(control.references) != self.config.references:
            raise ValueError(
                f"a control video has {len(control.references)} reference pictures, and backbone.references is "
                f"{self.config.references}"
            )
        frames, (count, channels, high, wide) = control.frames, self.latent_shape
        mask = torch.ones_like(frames[:, 0]) if control.mask is None else control.mask
        made = (mask > 0.5).to(frames.dtype)[:, None]
        parts = [self.encode((0.5 + (frames - 0.5) * part)[None]) for part in (1 - made, made)]
        side = frames.shape[-1] // wide
        by_pixel = mask.view(len(mask), high, side, wide, side).permute(2, 4, 0, 1, 3).flatten(0, 1)
        latent_mask = F.interpolate(by_pixel[None], size=(parts[0].shape[1], high, wide), mode="nearest-exact")
        rows = torch.cat([*parts, latent_mask.transpose(1, 2).to(parts[0])], dim=2)
        for picture in control.references:
            latents = self.encode(self.on_white(picture)[None, None])
            rest = latents.new_zeros(1, 1, rows.shape[2] - channels, high, wide)
            rows = torch.cat([torch.cat([latents, rest], dim=2), rows], dim=1)
        assert rows.shape[1] == count
        return Conditioning({"image_latents": rows.to(self.dtype)})

    def on_white(self, picture: Tensor) -> Tensor:
        """A reference [3, h, w] in the middle of a white picture of the size of the videos, as large as fits, resized
        as the stock pipeline does."""
        from diffusers.video_processor import VideoProcessor

        high, wide = self.config.height, self.config.width
        pixels = VideoProcessor(vae_scale_factor=8).preprocess(to_picture(picture)) / 2 + 0.5  # of whole latents
        scale = min(high / pixels.shape[-2], wide / pixels.shape[-1])
        size = [int(side * scale) for side in pixels.shape[-2:]]
        top, left = (high - size[0]) // 2, (wide - size[1]) // 2
        canvas = torch.ones(3, high, wide)
        resized = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)[0]
        canvas[:, top : top + size[0], left : left + size[1]] = resized
        return canvas.to(picture.device)

    def image_shapes(self) -> dict[str, tuple[int, ...]]:
        frames, _, *size = self.latent_shape
        return {"image_latents": (frames, self.network_config["vace_in_channels"], *size)}
