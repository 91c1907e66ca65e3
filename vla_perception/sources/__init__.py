"""Where images come from without ROS: recordings, video files and devices, a simulated scene, image files.

Words: a *source* is opened and gives *frames*, each with its age or its time; a *recording* (bag) gives serialised
messages. Nothing that a file says of itself is trusted: sizes are bounded, damage is an error.

    bags/           rosbag2 recordings
    video.py        V4L2 devices, network streams and video files, through OpenCV
    simulation.py   cameras of a MuJoCo scene, rendered off screen; scenes/ has the one of this package
    image_files.py  files of images
"""
