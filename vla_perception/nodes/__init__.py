"""ROS 2 nodes, one file per executable, thin: what they compute lives outside this folder."""
