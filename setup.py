import sys
import xml.etree.ElementTree as ElementTree
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

NAME = "vla_perception"
ROOT = Path(__file__).resolve().parent  # `colcon build --symlink-install` runs a link to this file
manifest = ElementTree.parse(ROOT / "package.xml").getroot()

OPENCV = "opencv-python-headless>=4.8,<5"  # 5 drops conversions that ROS encodings need
TOKENIZER = [
    "torch>=2.4",
    "torchvision>=0.19",
    "timm>=1.0.26,<2",  # before, files are unpickled; another major version may name or compute something differently
    "huggingface_hub>=1.0,<3",  # timm brings it; range requests are made with its client, which changed with 1.0
    # Before, grey PNGs of 16 bits cannot be told from 32; 13 resizes tall images in another order than models saw: 15 % of
    # pixels differ.
    "pillow>=10.3,<13",
    # Refuses damaged JPEG, which Pillow and OpenCV fill with grey, and decodes as TensorFlow does where told to.
    "simplejpeg>=1.7",
    OPENCV,
]
# Wheels of ROS 2 Kilted (rclpy 9.1): Python 3.10 to 3.12, x86-64 Linux. On a machine with a ROS 2 distribution leave
# this extra out. requirements/jazzy.txt has Jazzy's.
ROS = [
    "ros-rclpy[fastrtps]>=9.1,<9.2",
    "ros-ament-index-python",
    "ros-builtin-interfaces",
    "ros-diagnostic-msgs>=5.5,<5.6",  # the message packages' series must be the distribution's, like rclpy's
    "ros-lifecycle-msgs>=2.3,<2.4",
    "ros-rcl-interfaces>=2.3,<2.4",
    "ros-rosgraph-msgs>=2.3,<2.4",
    "ros-sensor-msgs>=5.5,<5.6",
    "ros-std-msgs>=5.5,<5.6",
    "ros-std-srvs>=5.5,<5.6",
]
# Tokens through shared memory beside the topic: 2 MiB reach a policy in about 1 ms. Wheels for x86-64 Linux only, so
# not on an aarch64 board, where pip would look for a Rust compiler. The layout of the memory changes from series to
# series; processes of different ones do not see each other, and do with the topic.
SHM = ["iceoryx2>=0.10,<0.11; platform_machine == 'x86_64' and sys_platform == 'linux'"]
BAGS = ["mcap>=1.1", "pyyaml>=6"]  # mcap brings zstandard and lz4
# Recorded data → tokens (docs/offline.md).
OFFLINE = [
    *BAGS,
    "rosbags>=0.11.2",  # messages of bags without ROS, and writing bags; older ones write no QoS into MCAP
    "av>=12",  # videos: its wheels bring FFmpeg, where torchcodec needs FFmpeg's libraries on the machine
    "pyarrow>=14",  # LeRobot datasets are parquet files
    "tqdm>=4.60",
]
RAY = ["ray>=2.30"]  # the same on a cluster: 70 MB
OPENVLA = ["torch>=2.4", "transformers>=4.46"]  # a policy that runs OpenVLA's language model on the tokens
# The page of `vla-perception view`: 5 MB, most of which huggingface_hub brings along anyway. aiohttp takes 12 MB, and
# what draws by itself (NiceGUI, viser, rerun-sdk) 100 to 760. simplejpeg makes JPEGs of raw images.
VIEW = ["starlette>=0.40,<2", "uvicorn>=0.30", "websockets>=13", "simplejpeg>=1.7"]
SIM = ["mujoco>=3.2", OPENCV]
TEST = [
    "pytest>=8,<10",
    "pytest-xdist>=3.5",  # tests without ROS in a process per core
    "scikit-image>=0.22",  # photographs
    "rosbags>=0.11.2",  # writes bags
    "pyyaml",
    "packaging",
    "selenium>=4.20,<5",  # drives Debian's Chromium; finds no driver by itself on the network where it is given one
    "transformers>=4.46",  # a miniature OpenVLA, split between node and policy
    "catkin_pkg",  # colcon-ros needs it to read package.xml
    "colcon-core",
    "colcon-bash",
    "colcon-package-information",  # `colcon list`
    "colcon-ros",
    "setuptools>=68,<80",  # 80 dropped what colcon calls (`setup.py develop` and options of `install`)
]
# What `make check` runs. Another series of theirs finds other things, so it comes by a change here.
DEV = ["ruff>=0.17,<0.18", "mypy>=2.4,<2.5", "codespell>=2.4,<2.5", "mdformat>=1.0,<2", "mdformat-gfm>=1.0,<2"]

data_files = [
    ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
    (f"share/{NAME}", ["package.xml"]),
    (f"share/{NAME}/launch", sorted(glob("launch/*.launch.py"))),
    (f"share/{NAME}/config", sorted(glob("config/*.*"))),
    (f"share/{NAME}/sample_bag", sorted(glob("examples/sample_bag/*"))),
]
if not {"bdist_wheel", "dist_info", "editable_wheel", "sdist"} & set(sys.argv):
    # colcon puts console scripts into lib/<package>, where `ros2 run` finds them and a shell does not. pip puts them
    # on the PATH by itself.
    data_files.append(("bin", ["scripts/vla-perception"]))

setup(
    name=NAME,
    version=manifest.findtext("version"),
    description=" ".join(manifest.findtext("description").split()),
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license=manifest.findtext("license"),
    maintainer=manifest.findtext("maintainer"),
    maintainer_email=manifest.find("maintainer").get("email"),
    packages=find_packages(include=[NAME, f"{NAME}.*"]),
    package_data={NAME: ["py.typed", "sources/scenes/*.xml", "view/page/*", "view/page/vendor/*"]},
    data_files=[(folder, files) for folder, files in data_files if files],
    zip_safe=False,
    python_requires=">=3.10",
    # What reading tokens takes: a policy's environment gets no torch from here.
    install_requires=["numpy>=1.26", "safetensors>=0.4", "ml_dtypes>=0.4"],
    extras_require={
        "tokenizer": TOKENIZER,
        "ros": ROS,
        "shm": SHM,
        "bags": BAGS,
        "view": VIEW,
        "offline": OFFLINE,
        "ray": RAY,
        "sim": SIM,
        "openvla": OPENVLA,
        "test": TEST,
        "dev": DEV,
        "all": TOKENIZER + ROS + SHM + OFFLINE + RAY + VIEW + SIM + OPENVLA + TEST + DEV,
    },
    entry_points={
        "console_scripts": [
            f"vla-perception = {NAME}.cli:main",
            f"visual_tokenizer = {NAME}.nodes.executables:visual_tokenizer",
            f"bag_player = {NAME}.nodes.executables:bag_player",
            f"opencv_camera = {NAME}.nodes.executables:opencv_camera",
            f"mujoco_camera = {NAME}.nodes.executables:mujoco_camera",
            f"token_viewer = {NAME}.nodes.executables:token_viewer",
        ]
    },
)
