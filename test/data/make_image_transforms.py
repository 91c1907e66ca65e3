"""Writes image_transforms.npz: what TensorFlow makes of images in OpenVLA's evaluation code, step by step.

    pip install tensorflow-cpu scikit-image
    python test/data/make_image_transforms.py

The calls are those of ``resize_image`` in OpenVLA's LIBERO and Bridge evaluations (JPEG round trip, Lanczos-3) and of
``crop_and_resize`` and ``get_vla_action`` in its ``openvla_utils.py`` (centre crop with crop_scale 0.9), there always
to 224 × 224; other sizes keep the file small. The one in the repository was written with TensorFlow 2.21.0.
"""

import sys
from pathlib import Path

import numpy as np
import skimage.data
import tensorflow as tf

FILE = Path(__file__).with_name("image_transforms.npz")


def images() -> dict[str, tuple[np.ndarray, int]]:
    """Name → image, and the size it goes to."""
    noise = np.random.default_rng(0)
    return {
        "astronaut": (skimage.data.astronaut()[0:256, 96:352], 224),  # as LIBERO renders: 256 × 256
        "coffee": (skimage.data.coffee()[100:220, 200:360], 56),
        "cat": (skimage.data.chelsea()[90:135, 150:220], 112),  # enlarged
        "noise": (noise.integers(0, 256, (97, 61, 3), dtype=np.uint8), 56),
        "noise_enlarged": (noise.integers(0, 256, (40, 52, 3), dtype=np.uint8), 64),
        "noise_narrow": (noise.integers(0, 256, (9, 301, 3), dtype=np.uint8), 32),
        "noise_same": (noise.integers(0, 256, (64, 64, 3), dtype=np.uint8), 64),
    }


def jpeg(image: np.ndarray) -> np.ndarray:
    encoded = tf.io.encode_jpeg(image)
    return tf.io.decode_image(encoded, expand_animations=False, dtype=tf.uint8).numpy()


def lanczos3(image: np.ndarray, size: int) -> np.ndarray:
    resized = tf.image.resize(image, (size, size), method="lanczos3", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8).numpy()


def center_crop(image: np.ndarray, size: int, crop_scale: float = 0.9) -> np.ndarray:
    image = tf.image.convert_image_dtype(tf.convert_to_tensor(image), tf.float32)
    side = tf.reshape(tf.clip_by_value(tf.sqrt(crop_scale), 0, 1), shape=(1,))
    offset = (1 - side) / 2
    boxes = tf.stack([offset, offset, offset + side, offset + side], axis=1)
    image = tf.image.crop_and_resize(tf.expand_dims(image, axis=0), boxes, tf.range(1), (size, size))[0]
    return tf.image.convert_image_dtype(tf.clip_by_value(image, 0, 1), tf.uint8, saturate=True).numpy()


def main() -> None:
    arrays: dict[str, np.ndarray] = {}
    for name, (image, size) in images().items():
        arrays[f"{name}.input"] = np.ascontiguousarray(image)
        arrays[f"{name}.jpeg"] = jpeg(arrays[f"{name}.input"])
        arrays[f"{name}.lanczos3"] = lanczos3(arrays[f"{name}.jpeg"], size)
        arrays[f"{name}.center_crop"] = center_crop(arrays[f"{name}.lanczos3"], size)
    # Not square, and to another size than its own: both happen to nobody, and both tell apart what is easily mistaken.
    arrays["coffee.center_crop_of_input"] = center_crop(arrays["coffee.input"], 56)
    arrays["noise.center_crop_of_input"] = center_crop(arrays["noise.input"], 56)
    arrays["tensorflow"] = np.array(tf.__version__)
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {FILE.stat().st_size} bytes, TensorFlow {tf.__version__}, Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
