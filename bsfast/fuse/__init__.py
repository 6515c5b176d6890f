"""Fusing M ``torch.nn`` modules into one: traced by torch.fx, compared, and run on branched layers."""

import sys
from types import ModuleType

from bsfast.fuse.branched import Branched
from bsfast.fuse.entry import fuse, unfuse
from bsfast.fuse.rules import register_rule

__all__ = ["Branched", "fuse", "register_rule", "unfuse"]


class _CallablePackage(ModuleType):
    """The package shares its name with the function: importing it puts it at ``bsfast.fuse``, which must still fuse."""

    __call__ = staticmethod(fuse)


sys.modules[__name__].__class__ = _CallablePackage
