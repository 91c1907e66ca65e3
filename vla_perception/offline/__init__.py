"""Recorded data → tokens, offline: what a policy is trained on, computed as the node computes what the robot sends.

Words
    source      what a user names: image files, a folder of images, a video, a rosbag2 recording, a LeRobot dataset.
    recording   what becomes one token file: a bag, a video, a folder of images, the image files of one command, one
                episode of a dataset.
    frame set   one image per camera of a recording, matched; becomes one message's tokens.
    token file  one safetensors file with all tokens of a recording (docs/offline.md has the layout).
    run         a folder of token files and their index, `index.json`.

Modules, in the order of the data
    recordings.py           from sources to recordings; frame sets
    bag_recordings.py, image_recordings.py, video_recordings.py, lerobot.py
                            the kinds of recordings
    token_file.py           the layout of a token file; reading it by memory map
    token_file_writer.py    writing it frame by frame, so that an interrupted run goes on
    run_index.py            the index of a run, and what must not change between two parts of it
    run.py                  decode → encode → write, side by side
    bag_output.py           a token file → a bag of token messages
    ray_engine.py           the same run on a Ray cluster
    verify.py, live.py      token files against each other, and against a running tokenizer
    token_dataset.py        a run as a dataset to train on
    command.py              `vla-perception tokenize` and `verify`

Reading (token_file.py, token_dataset.py) takes NumPy alone. live.py alone knows ROS.
"""
