"""The paper's experiments; run them with ``python -m experiments``."""
