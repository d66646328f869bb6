"""Build script: the metadata are in pyproject.toml."""

from setuptools import setup

setup()
