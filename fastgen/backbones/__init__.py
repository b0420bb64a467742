"""Model families by name; a class is imported only when a recipe chooses it."""

BACKBONES: dict[str, str] = {
    "ar1_video": "fastgen.backbones.ar1_video:AR1VideoConfig",
    "flux": "fastgen.backbones.flux:FluxConfig",
    "gaussian_mixture": "fastgen.backbones.gaussian_mixture:GaussianMixtureConfig",
    "qwen_image": "fastgen.backbones.qwen_image:QwenImageConfig",
    "sd": "fastgen.backbones.sd:SDConfig",
    "sd3": "fastgen.backbones.sd3:SD3Config",
    "wan": "fastgen.backbones.wan:WanConfig",
}
