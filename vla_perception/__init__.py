"""Camera images to the visual tokens of vision-language-action policies, on ROS 2 and without it."""

__version__: str


def __getattr__(name: str) -> str:
    """`__version__`, looked up when asked for: that takes longer than what a node does before it takes signals."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import metadata

    try:
        return metadata.version(__name__)
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
