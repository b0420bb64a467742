"""fastgen: turn a diffusers pipeline into a few-step one, and know that it worked."""

__version__ = "0.2.0"
