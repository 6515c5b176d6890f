"""The Hessian of a trained classifier and of the same one before training: Figure 5, right, and section 8."""
