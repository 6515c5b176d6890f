"""Tests of the CUDA kernels that need no GPU: `make test-device` runs them, `make codegen-full` the rest of them."""

import os

_PLUGINS = "as_*.py"  # for the processes that tests start
_IGNORED = {"1": [_PLUGINS, "test_every_instance.py"], "full": [_PLUGINS]}
collect_ignore_glob = _IGNORED[chosen] if (chosen := os.environ.get("BSFAST_TEST_DEVICE")) else ["*"]
