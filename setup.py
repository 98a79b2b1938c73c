"""Everything is declared in pyproject.toml. Nothing is compiled: this version has no csrc/."""

from setuptools import setup

setup()
