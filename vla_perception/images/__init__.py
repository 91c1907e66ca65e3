"""Image messages to RGB arrays and back, and camera calibration. Knows sensor_msgs, but neither nodes nor the tokenizer."""
