"""Evaluate a saved Core ML program on any host: coremltools' value inference, torch for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.backends.coreml.mil_ops import OPS
from graphopt.errors import VerificationError
from graphopt.extras import require

__all__ = ["Evaluation", "ProgramRun", "dense_value", "evaluate", "load_program"]

_CONSTEXPR_INPUTS = {
    "constexpr_blockwise_shift_scale": ("data", "scale", "offset"),
    "constexpr_affine_dequantize": ("quantized_data", "zero_point", "scale", "axis"),
    "constexpr_sparse_to_dense": ("nonzero_data", "mask"),
    "constexpr_lut_to_dense": ("indices", "lut", "vector_axis"),
    "constexpr_lut_to_sparse": ("indices_mask", "indices_nonzero_data", "lut", "vector_axis"),
    "constexpr_sparse_blockwise_shift_scale": ("data_mask", "nonzero_data", "scale", "offset"),
}
# the packed forms of iOS 16 and 17 carry the shape of the result
_PACKED_INPUTS = {
    "constexpr_lut_to_dense": ("lut", "indices", "shape"),
    "constexpr_sparse_to_dense": ("nonzero_data", "mask", "shape"),
}


@dataclass(frozen=True)
class Evaluation:
    """What a program computed.

    Attributes:
        outputs: Output name → value, in the program's order; empty when something is missing.
        constexprs: Number of compressed weights that were decompressed.
        unevaluated: Types of ops for which there is no rule.
    """

    outputs: dict[str, NDArray[Any]]
    constexprs: int
    unevaluated: tuple[str, ...] = ()


def load_program(path: Path) -> Any:
    """The MIL program of a saved package, with its weights.

    Raises:
        VerificationError: The package cannot be read.
    """
    ct = require("coremltools", "coreml")
    from coremltools.converters.mil.frontend.milproto.load import load

    try:
        model = ct.models.MLModel(str(path), skip_model_load=True)
        spec = model.get_spec()
        return load(spec, spec.specificationVersion, model.weights_dir)
    except Exception as error:
        raise VerificationError(f"{path.name} cannot be read back: {error}") from error


def dense_value(var: Any) -> Any:
    """Value of a constant, or of any nest of constexpr ops."""
    if var is None:
        return None
    op = var.op
    if op is None or var.val is not None:
        return var.val
    given = {
        name: dense_value(value)
        for name, value in op.inputs.items()
        if value is not None and not isinstance(value, list | tuple)
    }
    if op.op_type == "constexpr_cast":
        return np.float32(given["source_val"])
    table = _PACKED_INPUTS if "shape" in given else _CONSTEXPR_INPUTS
    order = table[op.op_type]
    result = type(op).decompress(*(given.get(name) for name in order))
    return result[list(op.outputs).index(var)] if len(op.outputs) > 1 else result


def evaluate(program: Any, inputs: Mapping[str, NDArray[Any]]) -> Evaluation:
    """Run function "main" of a loaded program once; see `ProgramRun`."""
    return ProgramRun(program)(inputs)


class ProgramRun:
    """Calls of one function of a loaded program, its state being zero before the first.

    Args:
        program: From `load_program`.
        function: Its name.
        state: What several functions keep together; None for state of its own.

    Attributes:
        inputs: Names of the function's inputs.
        state: Name of a state → what it holds now.
    """

    def __init__(
        self, program: Any, function: str = "main", state: dict[str, NDArray[Any]] | None = None
    ) -> None:
        from coremltools.converters.mil.mil import types

        self._main = program.functions[function]
        given = self._main.inputs.items()
        held = {name: var for name, var in given if types.is_state(var.sym_type)}
        self.inputs = [name for name, _ in given if name not in held]
        self._open = any(_is_open(self._main.inputs[name]) for name in self.inputs)
        self.state = {} if state is None else state
        for name, var in held.items():
            kind = types.nptype_from_builtin(var.dtype)
            self.state.setdefault(name, np.zeros([int(size) for size in var.shape], kind))

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> Evaluation:
        """One call, from the state that the one before left.

        Args:
            inputs: Input name → value.

        Raises:
            VerificationError: A rule fails, or an input does not fit.
        """
        main, state = self._main, self.state
        missing = sorted({op.op_type for op in main.operations if not _has_rule(op)})
        constexprs = 0
        for name in self.inputs:
            _set(main.inputs[name], inputs[name], open_sizes=self._open)
        for op in main.operations:
            if op.op_type == "const":
                var = op.outputs[0]
                if isinstance(var.val, np.bool_):
                    # numpy 2.4 refuses np.bool_ where coremltools passes it on as keepdims
                    var._sym_val.val = bool(var.val)
            elif op.op_type.startswith("constexpr_"):
                for var in op.outputs:
                    if var.val is None:
                        _set(var, dense_value(var))
                constexprs += _is_a_weight(op)
            elif op.op_type == "read_state":
                _set(op.outputs[0], state[op.input.name])
            elif op.op_type == "coreml_update_state" and not missing:
                state[op.state.name] = np.array(op.value.val)
                _set(op.outputs[0], op.value.val)
            elif not missing:
                _run(op, open_sizes=self._open)
        if missing:
            return Evaluation({}, constexprs, tuple(missing))
        outputs = {var.name: np.array(var.val) for var in main.outputs}
        return Evaluation(outputs, constexprs)


_STATE_OPS = ("read_state", "coreml_update_state")


def _has_rule(op: Any) -> bool:
    from coremltools.converters.mil.mil.operation import Operation

    kind = op.op_type
    if kind in OPS or kind == "const" or kind in _STATE_OPS or kind.startswith("constexpr_"):
        return True
    return type(op).value_inference is not Operation.value_inference


def _is_a_weight(op: Any) -> bool:
    """Whether a constexpr op gives a whole weight, not part of one or outliers added to one."""
    users = [user for var in op.outputs for user in var.child_ops]
    if op.op_type == "constexpr_sparse_to_dense" and all(
        reader.op_type == "add" for reader in users
    ):
        others = [var.op for reader in users for var in (reader.x, reader.y) if var.op is not op]
        if all(reader is not None and reader.op_type.startswith("constexpr_") for reader in others):
            return False
    return any(not user.op_type.startswith("constexpr_") for user in users)


def _is_open(var: Any) -> bool:
    return any(not isinstance(size, int | np.integer) for size in var.shape)


def _run(op: Any, *, open_sizes: bool = False) -> None:
    try:
        if op.op_type in OPS:
            given = {name: _plain(value) for name, value in op.inputs.items() if value is not None}
            result = OPS[op.op_type](given)
            results = result if isinstance(result, tuple) else (result,)
            for var, value in zip(op.outputs, results, strict=True):
                _set(var, value, open_sizes=open_sizes)
        else:
            op.type_value_inference(overwrite_output=True)
            for var in op.outputs:
                # inference of scalars gives Python's numbers, which the next op does not take
                if isinstance(var.val, bool | int | float):
                    var._sym_val.val = np.asarray(var.val, _number_type(var))[()]
    except Exception as error:
        raise VerificationError(f"MIL op {op.op_type} ({op.name}): {error}") from error
    if any(var.val is None for var in op.outputs):
        raise VerificationError(f"MIL op {op.op_type} ({op.name}) gave no value")


def _number_type(var: Any) -> Any:
    from coremltools.converters.mil.mil import types

    return types.nptype_from_builtin(var.dtype)


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value.val


def _set(var: Any, value: Any, *, open_sizes: bool = False) -> None:
    """Give a variable a value; with open sizes its type takes the value's shape."""
    from coremltools.converters.mil.mil import types

    kind = var._sym_type
    array = np.asarray(value)
    if open_sizes and types.is_tensor(kind) and array.ndim == var.rank:
        kind = types.tensor(var.dtype, array.shape)
        var._sym_type = kind
    holder = kind()
    if types.is_tensor(kind):
        declared = [d for d in var.shape if isinstance(d, int | np.integer)]
        if array.ndim != var.rank or (len(declared) == var.rank and tuple(declared) != array.shape):
            raise VerificationError(
                f"{var.name}: value of shape {array.shape}, declared {tuple(var.shape)}"
            )
        holder.val = array.astype(types.nptype_from_builtin(var.dtype))
    else:
        holder.val = types.nptype_from_builtin(kind)(array.item())
    var._sym_val = holder
