"""What people have on disk or on the hub, read as a `Checkpoint`: which tensor lies where, and the configuration."""
