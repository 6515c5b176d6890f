"""A pytest plugin that gives the CPU Triton's kernels: ``BSFAST_NATIVE=0 pytest -p tests.device.as_triton``.

After ``-p tests.device.as_cuda`` they are beside the emulated ones, as on a GPU.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # read as kernels are defined

from bsfast.ops import backend
from bsfast.ops.library import LIBRARY
from tests.device.tools import TOOLS

sys.path.append(str(TOOLS))

from bsfast.triton import OPERATORS

for name, launch in OPERATORS.items():
    LIBRARY.impl(name, launch, "CPU")
before = backend._KERNELS["cpu"] if backend._why_not["cpu"] is None else backend._TRITON
backend._KERNELS["cpu"] = backend.Kernels(before.dtypes, before.operators | backend._TRITON.operators)
backend._why_not["cpu"] = None
