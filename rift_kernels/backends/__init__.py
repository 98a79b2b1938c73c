"""Implementations of the primitives, one module each. They import nothing from the package."""
