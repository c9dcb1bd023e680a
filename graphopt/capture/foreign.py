"""What models of transformers need to be captured as they are given, and read again."""

from __future__ import annotations

import logging
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["missing_module", "without_cache"]

_log = logging.getLogger(__name__)
_OP = re.compile(rb"torch\.ops\.(\w+)\.(\w+)")
_TYPE = re.compile(rb'"((?:transformers|torchvision|timm|diffusers)\.[\w.]+)\.\w+\\*"')


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Inside, a decoder of transformers gives no cache, which is no tensor that a graph can give.

    A line of the log says so; a model with a static cache in buffers is one that
    `transformers.integrations.executorch` wraps, and stays as it is.

    Args:
        model: Any module.
    """
    config: Any = getattr(model, "config", None)
    if not getattr(config, "use_cache", False) or not hasattr(model, "generation_config"):
        yield
        return
    _log.info(
        "%s: captured with use_cache=False; for a cache wrap it: transformers.integrations.executorch"
        ".TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=…).model",
        type(model).__name__,
    )
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = True


def missing_module(path: Path) -> str:
    """What has to be imported so that a program's ops and outputs can be made; "" for nothing.

    Args:
        path: A .pt2 file that does not load.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            texts = [archive.read(name) for name in archive.namelist() if name.endswith(".json")]
    except (OSError, zipfile.BadZipFile):
        return ""
    for text in texts:
        for library, op in _OP.findall(text):
            if not hasattr(getattr(torch.ops, library.decode()), op.decode()):
                return (
                    f"; it calls torch.ops.{library.decode()}.{op.decode()}, which nothing has"
                    f" registered: import the module that defines the op (of {library.decode()})"
                    " before it is read"
                )
        for module in _TYPE.findall(text):
            name = module.decode()
            # importing the package alone does not make the type known, as it loads its parts late
            if name not in sys.modules:
                return f"; it gives values of a type of {name}: `import {name}` before it is read"
    return ""
