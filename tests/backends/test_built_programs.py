"""What is built from captured graphs is what torch's tracer makes of them, op by op and target by target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from helpers.op_calls import calls_of, counted_ops
from helpers.op_sweep import together_call
from torch.export import ExportedProgram

import graphopt
from graphopt.errors import GraphOptError
from graphopt.ir import decomposing, program

_OPS = counted_ops()
_SIZE = 12  # ops that are tried in one test


def _coreai(captured: graphopt.Program) -> ExportedProgram:
    from graphopt.backends.coreai.lower import legal_export
    from graphopt.backends.coreai.options import CoreAIOptions

    return legal_export(captured, CoreAIOptions())


def _coreml(captured: graphopt.Program) -> ExportedProgram:
    from graphopt.backends.coreml.lower import legal_export

    return legal_export(captured, "iOS18")


def _executorch(captured: graphopt.Program) -> ExportedProgram:
    from graphopt.backends.executorch.lower import legal_export

    return legal_export(captured, "auto", ())[0]


_FORMS: dict[str, Callable[[graphopt.Program], ExportedProgram]] = {
    "coreai": _coreai,
    "coreml": _coreml,
    "executorch": _executorch,
}


def _ops(exported: ExportedProgram) -> Counter[str]:
    """Its ops; assertions on types, which held when the program was captured, are no computation."""
    names = (str(node.target) for node in exported.graph.nodes if node.op == "call_function")
    return Counter(name for name in names if "_assert_" not in name)


def _made(form: Callable[..., ExportedProgram], captured: graphopt.Program) -> Any:
    try:
        return _ops(form(captured))
    except GraphOptError as error:
        return type(error)


def _traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch trace what would be built."""
    monkeypatch.setattr(program, "lifted", lambda *_: None)
    monkeypatch.setattr(decomposing, "_is_simple", lambda _: False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "target",
    [pytest.param(name, marks=getattr(pytest.mark, name)) for name in _FORMS],
)
@pytest.mark.parametrize("first", range(0, len(_OPS), _SIZE))
def test_ops_are_those_that_tracing_gives(
    target: str, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    differ = []
    for op in _OPS[first : first + _SIZE]:
        calls = calls_of(op)
        if not calls:
            continue
        call = together_call(calls)
        try:
            captured = graphopt.capture(call.module, call.inputs)
        except GraphOptError:
            continue
        built = _made(_FORMS[target], captured)
        with monkeypatch.context() as patch:
            _traced(patch)
            traced = _made(_FORMS[target], captured)
        if built != traced:
            differ.append((op, built, traced))
    assert not differ, differ
