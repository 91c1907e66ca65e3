"""Camera images to the visual tokens of vision-language-action policies, on ROS 2 and without it."""

from importlib import metadata as _metadata

try:
    __version__: str = _metadata.version(__name__)
except _metadata.PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "unknown"
