"""Devices to compute on: the CPU by torch, accelerators where there are any, and a pretended one."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch


def accelerators() -> list[Any]:
    """The CPU by torch, and every kind of accelerator, skipped where there is none."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    marks = {
        name: pytest.mark.skipif(not there, reason=f"there is no device {name!r} here")
        for name, there in here.items()
    }
    real = [pytest.param(name, marks=mark) for name, mark in marks.items()]
    # a device of its own kind: with `-p helpers.pretended_device`
    return ["cpu", *real, *(["pretended"] if "helpers.pretended_device" in sys.modules else [])]


DEVICES = pytest.mark.parametrize("device", accelerators())
