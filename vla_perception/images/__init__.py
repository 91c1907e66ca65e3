"""Image messages and RGB arrays, and camera calibration. Knows sensor_msgs, but neither nodes nor the tokenizer.

Words: a *message* is a sensor_msgs Image or CompressedImage; its *encoding* says what raw bytes mean ("bgr8"), its
*format* what a compressed message holds ("bgr8; jpeg compressed bgr8"). A *stream* is a JPEG or PNG file's bytes. An
*image*, where nothing else is said, is uint8 [height, width, 3] RGB.

    decode.py       message -> image, for either type and every encoding with a meaning in color: `decode_image`
    streams.py      JPEG and PNG: whole ones of bounded size, or an error
    encode.py       image -> message
    camera_info.py  calibration files and pinhole models -> CameraInfo
"""
