"""Metadata of fastflow. Nothing here looks at the hardware, so that a wheel is the same wherever it is built."""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).resolve().parent
# Read as text: importing fastflow would need torch, which an isolated build does not have.
version = re.search(r'__version__ = "(.+?)"', (root / "fastflow" / "_version.py").read_text(encoding="utf-8")).group(1)
readme = root / "README.md"

# OGBench requires dm_control, and that requires labmaze, which OGBench never imports and which has no wheel for Python
# 3.13. There the two are installed without their dependencies (the Makefile does it), and what they use is listed here.
by_pip = "python_version < '3.13'"
by_hand = "python_version >= '3.13'"
simulator = ["absl-py", "dm-env", "dm-tree", "glfw", "gymnasium[mujoco]", "lxml", "mujoco>=3.17", "protobuf"]
simulator += ["pyopengl", "pyparsing", "requests", "scipy", "setuptools"]
rl = [
    "gymnasium>=1.0",
    f"ogbench>=1.2; {by_pip}",
    "safetensors>=0.4",
    "scipy>=1.11",
    "tensorboard>=2.16",
    "tqdm>=4.66",
    "tyro>=0.9",
    *(f"{name}; {by_hand}" for name in simulator),
]
# The DM control suite asks MuJoCo for what version 4 no longer has, hence apart from [rl], which works with both. It is
# not in [dev] either: the tests have that MuJoCo in a folder of its own (the Makefile fills it).
dmc = [f"dm_control>=1.0.20; {by_pip}", "mujoco>=3.17,<4"]
plot = ["matplotlib>=3.8"]
docs = ["mkdocs>=1.6", "mkdocstrings[python]>=1.0"]
# Videos of episodes: GIF needs imageio alone, which Gymnasium's MuJoCo environments need too, MP4 a codec.
video = ["imageio[ffmpeg]>=2.34"]
# Its losses' hooks that fastflow.torchrl uses are those of 0.14.
torchrl = ["torchrl>=0.14.1"]
# The client of the Hugging Face Kernel Hub, which loads what `python -m fastflow.hub` writes.
hub = ["kernels>=0.17"]
dev = [
    "hypothesis>=6.100",
    "mypy>=1.15",
    "pytest>=8.2",
    "pytest-benchmark>=5.0",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    # The install tests build a wheel, and Python 3.12 and later make virtual environments without setuptools.
    "setuptools>=70.1",
    # torch brings triton where it brings CUDA; its CPU builds do not, and the tests interpret and compile kernels.
    "triton>=3.6; sys_platform == 'linux'",
]

setup(
    name="fastflow",
    version=version,
    description="Flow matching inside reinforcement learning, with the integration and the loss as fused operators",
    long_description=readme.read_text(encoding="utf-8") if readme.is_file() else "",
    long_description_content_type="text/markdown",
    author="The fastflow authors",
    license="MIT",
    python_requires=">=3.10",
    # kernels/ is fastflow.kernels, never a top-level module: that name belongs to the Hugging Face Kernel Hub's client.
    packages=[
        *find_packages(include=["fastflow", "fastflow.*"]),
        "fastflow.kernels",
        *("fastflow.kernels." + name for name in find_packages("kernels")),
    ],
    package_dir={"fastflow": "fastflow", "fastflow.kernels": "kernels"},
    package_data={"fastflow": ["py.typed"], "fastflow.kernels.cpu": ["*.cpp", "*.h"]},
    install_requires=["numpy>=1.26", "torch>=2.11"],
    extras_require={
        "rl": rl,
        "dmc": dmc,
        "plot": plot,
        "video": video,
        "torchrl": torchrl,
        "hub": hub,
        # What the benchmarks compare with, and the figure that they draw.
        "rivals": ["jax>=0.4.30", "torchdiffeq>=0.2.4", *plot],
        "docs": docs,
        # Apart from [dev], as it brings a Node.js of 60 MB.
        "types": ["pyright[nodejs]>=1.1.400"],
        "dev": [*dev, *rl, *plot, *docs, *torchrl, *hub],
    },
    entry_points={"console_scripts": ["fastflow = fastflow.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
