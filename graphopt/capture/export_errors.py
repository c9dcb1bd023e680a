"""Why an export failed: op, module, source line, and what usually helps."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["explain_export_error", "quiet_failure", "without_warnings"]

_HINTS = (
    (
        re.compile("[Ii]nference tensor"),
        "The model or its inputs were made inside torch.inference_mode(), which torch.export cannot"
        " trace. Make them outside of it; torch.no_grad() does no harm.",
    ),
    (
        re.compile("data-dependent|DataDependent|Could not guard|item\\(\\)|nonzero"),
        "Python control flow depends on a tensor's values. Rewrite it with torch.where or"
        " torch.cond, or move it out of forward().",
    ),
    (
        re.compile("Constraints violated|specializ|dynamic_shapes"),
        "A dimension cannot be left open. Pass dynamic_shapes=None to fix all of them.",
    ),
    (
        re.compile("numpy|unsupported|Unsupported|not supported|\\.data\\b"),
        "forward() uses something that torch.export cannot trace, such as numpy or a foreign"
        " library. Use torch functions, or register a custom op (torch.library.custom_op).",
    ),
)


def explain_export_error(model: nn.Module, error: BaseException) -> str:
    """Say where the export failed: op, module, source line, and what usually helps."""
    chain = [error]
    while (
        cause := chain[-1].__cause__ or chain[-1].__context__
    ) is not None and cause not in chain:
        chain.append(cause)
    names = {id(module): name for name, module in model.named_modules()}
    module_name, place = "", ""
    for link in chain:
        for frame, line in traceback.walk_tb(link.__traceback__):
            owner = frame.f_locals.get("self")
            if id(owner) in names and isinstance(owner, nn.Module):
                inside = "/torch/" in frame.f_code.co_filename.replace("\\", "/")
                module_name = f"{names[id(owner)] or '(root)'} ({type(owner).__name__})"
                if not inside or not place:
                    summary = traceback.extract_tb(link.__traceback__)
                    text = next(
                        (
                            s.line
                            for s in summary
                            if s.lineno == line and s.name == frame.f_code.co_name
                        ),
                        "",
                    )
                    place = f"{frame.f_code.co_filename}:{line}: {text}"
    message = str(error)
    everything = "\n".join(map(str, chain))
    named = re.search(
        r"\b(?:torch\.ops\.)?(?:aten|prims)[.:]+\w+(?:\.\w+)?|\b[a-z]\w*::\w+(?:\.\w+)?", everything
    )
    op = named.group(0) if named else "not named by torch.export"
    if named is None and "DataDependent" in type(error).__name__:
        op = "aten.item, which turns a tensor into a Python value"
    hint = next(
        (text for pattern, text in _HINTS if any(pattern.search(str(link)) for link in chain)),
        "Check that torch.export.export(model, example_inputs, strict=False) works on its own.",
    )
    first = message.strip().splitlines()[0] if message.strip() else ""
    return (
        f"cannot export {type(model).__name__}: {type(error).__name__}: {first}\n"
        f"  op: {op}\n"
        f"  module: {module_name or 'unknown'}\n"
        f"  source: {place or 'unknown'}\n"
        f"  what usually helps: {hint}"
    )


@contextmanager
def quiet_failure() -> Iterator[None]:
    """Keep from the console what torch prints of an export that fails: graphs, and warnings of its parts.

    What the model itself writes there comes once the block has ended well.
    """
    said = io.StringIO()
    with (
        without_warnings("torch.fx.experimental.symbolic_shapes"),
        without_warnings("torch._subclasses.fake_tensor", logging.CRITICAL),
        contextlib.redirect_stderr(said),
    ):
        yield
    if said.getvalue():
        sys.stderr.write(said.getvalue())


@contextmanager
def without_warnings(name: str, least: int = logging.ERROR) -> Iterator[None]:
    """Keep a library's logger from saying what our own error says, below a level."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(least)
    try:
        yield
    finally:
        logger.setLevel(level)
