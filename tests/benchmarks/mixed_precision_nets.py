"""Networks and data of `mixed_precision.py`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent.parent


def images(count: int, side: int = 224) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def random_resnet50() -> nn.Module:
    from model import resnet50

    torch.manual_seed(0)
    model = resnet50()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.2, 0.6)
    return model.eval()


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


Network = tuple[nn.Module, tuple[Any, ...], list[Any], list[Any]]


def stand_in(folder: Path) -> Network:
    """The example's ResNet: model, example, calibration batches, held-out batches."""
    from model import digits, trained

    (x, _), (held, _) = digits()
    return trained(folder / "resnet.pt"), (x[:2],), list(x[:512].split(64)), list(held.split(100))


def encoder(sentences: int | None = 192) -> Network:
    """The pretrained sentence encoder with the sentences that its example ships."""
    import importlib.util

    place = ROOT / "examples" / "sentence_encoder" / "model.py"
    spec = importlib.util.spec_from_file_location("sentence_encoder_model", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    calibration = module.batches("calibration", limit=sentences)
    return module.load(), calibration[-1], calibration, module.batches("evaluation")
