"""Segmentation by the components of a decomposition: the paper's Figures 12 and 21."""
