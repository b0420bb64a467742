"""Model families by name; a class is imported only when a recipe chooses it."""

from fastgen.registry import BACKBONES

__all__ = ["BACKBONES"]
