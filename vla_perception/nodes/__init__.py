"""ROS 2 nodes, one file per executable, and what they share."""
