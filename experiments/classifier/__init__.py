"""Branched image classifier of the paper's Figures 5 and 6."""
