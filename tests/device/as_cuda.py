"""A pytest plugin that gives the CPU the emulated CUDA kernels: ``BSFAST_NATIVE=0 pytest -p tests.device.as_cuda``."""

import os

import torch

from bsfast.ops import backend, plan

torch.ops.load_library(os.environ["BSFAST_EMULATED_LIBRARY"])
backend._KERNELS["cpu"] = backend._KERNELS["cuda"]
backend._why_not["cpu"] = None
# As on CUDA: no tiles of Winograd, nor patches.
plan.set_winograd_tile(0)
plan._patch_gain = lambda problem: 0.0
