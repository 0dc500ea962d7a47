"""The generalized Gaussian distribution."""
