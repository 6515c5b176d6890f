"""Tests of the CUDA kernels that need no GPU: `make test-device` runs them, `make test` does not."""

import os

collect_ignore_glob = [] if os.environ.get("BSFAST_TEST_DEVICE") else ["*"]
