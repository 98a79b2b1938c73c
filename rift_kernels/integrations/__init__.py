"""RIFT inside trainers, a module each; none is imported with the package."""
