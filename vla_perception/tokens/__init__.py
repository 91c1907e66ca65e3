"""Visual tokens as they travel: the message, its transports, and what a policy imports. NumPy; rclpy and torch only where used."""
