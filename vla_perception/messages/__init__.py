"""ROS messages to arrays and back. Knows sensor_msgs, but neither nodes nor the tokenizer."""
