"""Attention masks are taken as they are given while a model is exported."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from graphopt.exclusive import patched
from graphopt.ir import torch_private

__all__ = ["masks_as_given"]


def masks_as_given() -> AbstractContextManager[None]:
    """Let torch's transformers not look into a mask to find out whether it is the causal one.

    `TransformerEncoder` and `TransformerDecoder` do, to pick a faster kernel, and so nothing with a mask can be
    exported. The mask is applied either way. It patches torch for all threads, so it belongs inside `exclusive`.
    """
    return patched(torch_private.transformer, _detect_is_causal_mask=_as_told)


def _as_told(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
    return is_causal is True
