"""Entry of ``python -m experiments``."""

import sys

from experiments.common.cli import main

if __name__ == "__main__":
    sys.exit(main())
