"""The version, in the one place that everything else reads: the package's metadata too."""

__version__ = "0.1.0"
