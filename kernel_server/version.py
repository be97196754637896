"""The version of the package, read from its metadata once."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("djinn-nb")
except PackageNotFoundError:  # run from a folder that was never installed
    VERSION = "0+unknown"
