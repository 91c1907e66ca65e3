"""ROS 2 nodes: a file or folder per executable, and the modules that they share.

Words: a *parameter table* is a frozen dataclass whose fields are the node's parameters, each with its default, range and
text; *ending* is what a node does at SIGINT or SIGTERM: exit code 0 within 2 s, in any state.

    visual_tokenizer/      camera topics -> token messages
    token_viewer.py        token messages -> colors over the camera's image
    bag_player.py          a recording -> its topics, with the bytes that were recorded
    opencv_camera.py       a device, stream or video file -> camera topics
    mujoco_camera.py       a simulated scene -> camera topics
    camera_publisher.py    the topics of one camera, for both
    parameters.py          parameter tables: declaring, checking, changing while the node runs
    ignored_parameters.py  warnings of settings that have no effect
    requests.py            requests of peers that rclpy would end the process for
    executables.py         entry points: signals are handled before rclpy is imported
    node_runner.py         start-up errors in one line, the executor, ending
"""
