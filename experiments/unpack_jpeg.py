"""CIFAR-10 kept as JPEG scans with one header, as the plain .npz that ``npz:`` reads.

python -m experiments.unpack_jpeg cifar10_jpeg.npz cifar10.npz

In: jpeg_header, jpeg_bytes (all scans one after another), offsets, labels, n_train. Out: x_train, y_train, x_test,
y_test.
"""

import io
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image


def unpack(source: Path, target: Path) -> None:
    """Decode every image and write the two sets."""
    with np.load(source, allow_pickle=False) as file:
        head, scans, offsets = file["jpeg_header"].tobytes(), file["jpeg_bytes"].tobytes(), file["offsets"]
        labels, split = file["labels"].astype(np.int32), int(file["n_train"])
    images = [Image.open(io.BytesIO(head + scans[a:b] + b"\xff\xd9")) for a, b in pairwise(offsets)]
    x = np.stack([np.asarray(image) for image in images])
    np.savez_compressed(
        target, x_train=x[:split], y_train=labels[:split], x_test=x[split:], y_test=labels[split:]
    )  # fmt: skip


if __name__ == "__main__":
    unpack(*map(Path, sys.argv[1:3]))
