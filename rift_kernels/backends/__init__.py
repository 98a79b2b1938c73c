"""Backends: the primitives, fused measures, or both. They import nothing from the package."""
