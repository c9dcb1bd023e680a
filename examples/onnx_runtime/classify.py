"""Name held-out digits with a saved model: ONNX Runtime and numpy alone.

python examples/onnx_runtime/classify.py out/onnx_runtime/digits-W8A8.onnx
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import onnxruntime
from sklearn.datasets import load_digits


def digits(*, held_out: bool) -> tuple[Any, Any]:
    """Images, float32 [n, 8, 8] in 0 … 1, and labels; every fourth digit is held out."""
    whole = load_digits()
    chosen = (np.arange(len(whole.target)) % 4 == 0) == held_out
    return (whole.images[chosen] / 16).astype(np.float32), whole.target[chosen].astype(np.int64)


def session_of(path: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def named(session: Any, images: Any, batch: int = 64) -> Any:
    """What the model takes each image for; batches of any size, as the file leaves theirs open."""
    (place,) = session.get_inputs()
    starts = range(0, len(images), batch)
    scores = [session.run(None, {place.name: images[at : at + batch]})[0] for at in starts]
    return np.concatenate(scores).argmax(-1)


def main() -> None:
    images, labels = digits(held_out=True)
    for path in sys.argv[1:]:
        right = (named(session_of(path), images) == labels).mean()
        print(f"{path}: {right:.2%} of {len(labels)} digits")


if __name__ == "__main__":
    main()
