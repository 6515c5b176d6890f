"""Image decomposition by class transfer: Figures 9 to 15 and 18 to 21."""
