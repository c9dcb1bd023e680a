"""The net that reports are made of."""

from __future__ import annotations

import pytest
import torch
from helpers.reported_nets import Net
from torch import nn


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()
