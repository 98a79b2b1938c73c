"""RIFT in trainers, one module for each; importing the package imports none of them."""
