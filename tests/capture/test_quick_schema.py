import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._export.serde import schema, serialize
from torch.export import Dim

from graphopt.capture.quick_schema import SchemaReader, quick_unions


class _Net(nn.Module):
    """Arguments of many kinds: open sizes, optional tensors, lists, numbers and strings."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.embed = nn.Conv2d(3, 4, 3, bias=False), nn.Embedding(5, 4)

    def forward(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.nn.functional.gelu(self.conv(x), approximate="tanh").flatten(2)
        picked = torch.cat([y, y * 0.5], dim=1)[:, index]
        return picked.clamp(min=float("-inf")), torch.where(index > 0, index, -1).sum(0)


@pytest.fixture(scope="module")
def text() -> dict[str, Any]:
    shapes = {"x": {0: Dim.AUTO, 2: Dim.AUTO}, "index": {0: Dim.AUTO}}
    example = torch.randn(2, 3, 8, 8), torch.randint(0, 4, (6,))
    exported = torch.export.export(_Net(), example, dynamic_shapes=shapes, strict=False)
    return dict(json.loads(serialize.serialize(exported).exported_program))


def _reader() -> SchemaReader:
    return SchemaReader()


def test_a_program_is_what_torch_reads(text: dict[str, Any]) -> None:
    expected = serialize._dict_to_dataclass(schema.ExportedProgram, text)
    with quick_unions():
        found = _reader()(schema.ExportedProgram, text)
    assert type(found) is type(expected)
    assert serialize._dataclass_to_dict(found) == serialize._dataclass_to_dict(expected)
    assert found == expected
    assert len(serialize._dataclass_to_dict(found)["graph_module"]["graph"]["nodes"]) > 8


def test_what_a_later_version_has_added_is_passed_over(text: dict[str, Any]) -> None:
    assert _reader()(schema.ExportedProgram, {**text, "later": 1}) == _reader()(
        schema.ExportedProgram, text
    )


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (schema.Argument, {"as_int": 1, "as_bool": True}),
        (schema.Argument, {"as_later": 1}),
        (schema.Argument, []),
        (schema.Argument, {1: 2}),
        (schema.TensorArgument, {}),
        (schema.TensorArgument, {"name": [1]}),
        (schema.Graph, {"inputs": [{"as_later": 1}]}),
    ],
)
def test_what_torch_refuses_is_refused(kind: Any, data: Any) -> None:
    refusals = AssertionError, IndexError, KeyError, TypeError
    with pytest.raises(refusals) as expected:
        serialize._dict_to_dataclass(kind, data)
    with pytest.raises(type(expected.value)):
        _reader()(kind, data)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (float, 1),
        (float, "Infinity"),
        (list[float], [1, 2.5]),
        (list[int], []),
        (dict[str, schema.TensorArgument], {"a": {"name": "x"}}),
        (schema.TensorArgument | None, None),
        (list[list[int]], [[1], []]),
        (int, "no number"),
    ],
)
def test_numbers_lists_and_dicts_are_as_torch_reads_them(kind: Any, data: Any) -> None:
    expected = serialize._dict_to_dataclass(kind, data)
    found = _reader()(kind, data)
    assert found == expected
    assert type(found) is type(expected)


def test_unions_are_those_that_torch_makes() -> None:
    def made() -> list[Any]:
        return [schema.Argument.create(as_int=number) for number in (1, 2)]

    expected = made()
    with quick_unions():
        found = made()
    for one, other in zip(found, expected, strict=True):
        assert (one.type, one.value, vars(one)) == (other.type, other.value, vars(other))
        with pytest.raises(AttributeError, match="as_bool is not set"):
            _ = one.as_bool


@pytest.mark.parametrize("chosen", [{}, {"as_int": 1, "as_bool": True}, {"as_later": 1}])
def test_what_is_no_member_of_a_union_is_refused(chosen: dict[str, Any]) -> None:
    with quick_unions(), pytest.raises((AssertionError, TypeError)):
        schema.Argument.create(**chosen)


def test_fields_of_a_class_are_looked_up_once(
    text: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    fields = dataclasses.fields

    def noted(kind: Any) -> Any:
        asked.append(kind)
        return fields(kind)

    for module in (dataclasses, __import__("torch._export.serde.union", fromlist=["fields"])):
        monkeypatch.setattr(module, "fields", noted)
    serialize._dict_to_dataclass(schema.ExportedProgram, text)
    slow, asked[:] = len(asked), []
    with quick_unions():
        _reader()(schema.ExportedProgram, text)
    assert 0 < 5 * len(asked) < slow


def test_unions_are_made_as_before_afterwards() -> None:
    before = schema.Argument.create
    failing = quick_unions()
    with pytest.raises(RuntimeError, match="in between"), failing:
        raise RuntimeError("in between")
    assert schema.Argument.create == before
