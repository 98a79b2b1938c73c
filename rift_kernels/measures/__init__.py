"""The mathematics of each measure, on any backend: value and coefficients of the gradient."""
