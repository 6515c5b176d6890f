"""Synthetic images that are exact sums of known layers."""
