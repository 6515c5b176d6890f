"""Fusing M ``torch.nn`` modules into one: traced by torch.fx, compared, and run on branched layers."""

from bsfast.fuse.branched import Branched, fuse, unfuse
from bsfast.fuse.rules import register_rule

__all__ = ["Branched", "fuse", "register_rule", "unfuse"]
