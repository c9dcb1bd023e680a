"""Both ways between graphopt and torchao's PT2E quantization.

`AnnotateFromTorchao` lets any torchao `Quantizer` annotate our graphs, and `pipelines.quantize` and
its passes honour it; `GraphOptQuantizer` is our annotator as a torchao `Quantizer`, for
`prepare_pt2e` and `convert_pt2e`, alone, inside a `ComposableQuantizer` or around another quantizer.

Raises:
    MissingDependencyError: torchao is not installed.
"""

from graphopt.extras import require

require("torchao.quantization.pt2e", "torchao")

from graphopt.interop.torchao.annotate import AnnotateFromTorchao, quantize_with  # noqa: E402
from graphopt.interop.torchao.quantizer import GraphOptQuantizer  # noqa: E402

__all__ = ["AnnotateFromTorchao", "GraphOptQuantizer", "quantize_with"]
