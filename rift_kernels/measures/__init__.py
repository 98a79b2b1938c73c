"""The mathematics of each measure, for any backend: value and coefficients of the gradient."""
