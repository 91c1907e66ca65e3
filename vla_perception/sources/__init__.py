"""Where images come from without ROS: recordings, video files and devices, a simulated scene, image files."""
