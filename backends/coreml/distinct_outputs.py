"""Equal outputs stay several: coremltools' fusion of casts makes them one, under one name."""

from __future__ import annotations

from typing import Any

__all__ = ["FUSE_CASTS", "keep_outputs_distinct"]

FUSE_CASTS = "graphopt::fuse_casts_between_distinct_outputs"
_THEIRS = "common::cast_optimization"


def keep_outputs_distinct(pipeline: Any) -> None:
    """Let a pipeline fuse casts by our pass.

    In float16 an output is a cast of a 16-bit value. Where two outputs hold the same value, casts
    there and back between them cancel, theirs replaces one by the other, and the package has two
    outputs of one name. An identity stands between them instead.

    Args:
        pipeline: coremltools' passes; it is changed.
    """
    from coremltools.converters.mil.mil import Builder
    from coremltools.converters.mil.mil.passes.defs.optimize_repeat_ops import cast_optimization
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY, register_pass

    if FUSE_CASTS not in PASS_REGISTRY:

        class FuseCastsBetweenDistinctOutputs(cast_optimization):  # type: ignore[misc]
            def _dup_if_affect_io(self, new_var: Any, old_var: Any, before_op: Any) -> Any:
                outputs = getattr(old_var.op.enclosing_block, "outputs", ())
                if new_var in outputs and old_var in outputs:
                    return Builder.identity(x=new_var, before_op=old_var.op)
                return super()._dup_if_affect_io(new_var, old_var, before_op)

        FuseCastsBetweenDistinctOutputs.__name__ = FUSE_CASTS.split("::")[1]
        register_pass(namespace="graphopt")(FuseCastsBetweenDistinctOutputs)
    pipeline.passes = [FUSE_CASTS if name == _THEIRS else name for name in pipeline.passes]
