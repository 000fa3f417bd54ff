"""The version of the package is here, and once more in pyproject.toml."""

__version__ = "0.1.0"
