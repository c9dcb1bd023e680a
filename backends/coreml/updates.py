"""State updates right behind the values that they write, which is where Core ML does them in place."""

from __future__ import annotations

from typing import Any

__all__ = ["UPDATES", "place_updates"]

UPDATES = "graphopt::updates_behind_values"
_THEIRS = "common::canonicalize_inplace_pattern"
_STATE_OPS = ("read_state", "coreml_update_state")


def place_updates(pipeline: Any) -> None:
    """Let a pipeline place updates by our pass: coremltools' fails where two states are written.

    Args:
        pipeline: coremltools' passes; it is changed.
    """
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY, register_pass

    if UPDATES not in PASS_REGISTRY:

        class UpdatesBehindValues(AbstractGraphPass):  # type: ignore[misc]
            """Each update behind the op whose value it writes."""

            def apply(self, prog: Any) -> None:
                for function in prog.functions.values():
                    _place(function)

        UpdatesBehindValues.__name__ = UPDATES.split("::")[1]
        register_pass(namespace="graphopt")(UpdatesBehindValues)
    place = pipeline.passes.index(_THEIRS)
    pipeline.remove_passes({_THEIRS})
    pipeline.insert_pass(place, UPDATES)


def _place(block: Any) -> None:
    from coremltools.converters.mil.mil import Builder
    from coremltools.converters.mil.mil.scope import ScopeInfo

    for update in [op for op in block.operations if op.op_type == "coreml_update_state"]:
        source = update.value.op
        if source is None or source.op_type in _STATE_OPS or source.op_type == "const":
            continue
        order = list(block.operations)
        behind = order[order.index(source) + 1]
        if behind is update:
            continue
        scopes = [ScopeInfo(source=kind, data=data) for kind, data in source.scopes.items()]
        with block, Builder.scope(*scopes):
            made = Builder.coreml_update_state(
                state=update.state, value=update.value, before_op=behind
            )
        # an update that nothing reads is not dead
        if block.try_replace_uses_of_var_after_op(
            anchor_op=update, old_var=update.outputs[0], new_var=made
        ):
            block.remove_ops([update])
