"""Compare the result with uniform quantization and with the float model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.compressors.compressed_program import CompressedProgram
from graphopt.errors import InputError
from graphopt.run.batches import Batch, run_call
from graphopt.search.mixed_precision.candidates import Candidate
from graphopt.search.mixed_precision.metrics import METRICS, measure
from graphopt.search.rdo.report import Comparison
from graphopt.search.rdo.session import Session
from graphopt.specs import PerChannelGranularity, QuantizationSpec

__all__ = ["Evaluate", "compare", "uniform_program"]

Evaluate = Callable[[nn.Module], Tensor | float]


def uniform_program(session: Session, bits: int) -> CompressedProgram:
    """Every layer as integers of one width, rounded to the nearest, with a scale per output channel.

    Scales are those of the symmetric range that clips nothing. Activations are quantized as in the
    session's config.

    Args:
        session: The model.
        bits: 2, 3, 4, 6 or 8.

    Examples:
        >>> config = graphopt.rdo.RDOConfig.from_dict({"target_bits": 8, "candidates": [4, 8]})
        >>> session = graphopt.rdo.Session.open(model, example, batches, config)
        >>> len(uniform_program(session, 4).report())
        2
    """
    spec = QuantizationSpec(
        dtype=f"int{bits}", granularity=PerChannelGranularity(), algorithm="nearest"
    )
    one = Candidate(f"int{bits}", spec)
    return session.converted({layer.name: one for layer in session.layers}, progress=False)


def compare(
    session: Session,
    program: CompressedProgram,
    batches: Sequence[Batch],
    evaluate: Evaluate | None,
) -> tuple[Comparison, ...]:
    """One row per form of the model.

    Args:
        session: The model and its config.
        program: The result.
        batches: Inputs on which outputs are compared.
        evaluate: Score of a module, larger is better: one number, or one per sample.

    Raises:
        InputError: Scores of the samples differ in number between two forms.

    Examples:
        >>> config = graphopt.rdo.RDOConfig.from_dict({"target_bits": 8, "candidates": [4, 8]})
        >>> session = graphopt.rdo.Session.open(model, example, batches, config)
        >>> from graphopt.rdo import uniform_program
        >>> rows = compare(session, uniform_program(session, 4), session.batches, None)
        >>> [row.name for row in rows]
        ['float', 'uniform 8-bit', 'uniform 4-bit', 'rate-distortion']
    """
    kept = sum(layer.kept_bits for layer in session.layers) / session.weights
    forms: dict[str, tuple[nn.Module, float]] = {
        "float": (session.exact.module(), kept),
        "uniform 8-bit": _form(uniform_program(session, 8), session),
        "uniform 4-bit": _form(uniform_program(session, 4), session),
        "rate-distortion": _form(program, session),
    }
    rows: list[Comparison] = []
    reference: list[list[Tensor]] = []
    base: Tensor | None = None
    for name, (module, bits) in forms.items():
        outputs = [_outputs(module, batch) for batch in batches]
        reference = reference or outputs
        metric = METRICS[session.config.metric]
        pairs = list(zip(outputs, reference, strict=True))
        distance = sum(measure(metric, *pair) for pair in pairs) / len(pairs)
        agreement = None
        if session.config.metric == "kl":
            agreement = sum(measure(METRICS["top1"], *pair) for pair in pairs) / len(pairs)
        score = drop = error = None
        if evaluate is not None:
            with torch.no_grad():
                own = torch.as_tensor(evaluate(module), dtype=torch.float64)
            base = own if base is None else base
            if own.shape != base.shape:
                raise InputError(
                    f"evaluate gave scores of shape {tuple(own.shape)} for {name!r} and"
                    f" {tuple(base.shape)} for the float model"
                )
            score, drop = float(own.mean()), float((base - own).mean())
            if own.numel() > 1:
                error = float((base - own).std()) / math.sqrt(own.numel())
        row = Comparison(
            name=name,
            bits_per_weight=bits,
            ratio=32 / bits,
            distance=distance,
            agreement=agreement,
            score=score,
            drop=drop,
            error=error,
        )
        rows.append(row)
    return tuple(rows)


def _form(program: CompressedProgram, session: Session) -> tuple[nn.Module, float]:
    stored = {row.name: row.stored_bits for row in program.report()}
    bits = sum(stored.get(layer.name) or layer.kept_bits for layer in session.layers)
    return program.module(), bits / session.weights


def _outputs(module: nn.Module, batch: Batch) -> list[Tensor]:
    with torch.no_grad():
        leaves = pytree.tree_leaves(run_call(module, batch))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
