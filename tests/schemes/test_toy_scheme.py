"""A scheme of its own, from spec to saved file: what `graphopt.schemes.base` promises to new ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

import graphopt
from graphopt.analysis.stored_values import stored_values
from graphopt.analysis.weights import find_weights
from graphopt.backends.base import stored_weights
from graphopt.errors import ConfigError
from graphopt.inspection import bits_per_weight
from graphopt.ir.annotations import WeightAnnotation, annotate_weight, weight_annotation
from graphopt.ir.editor import Editor
from graphopt.mixed_precision import SizeModel
from graphopt.numerics.packing import pack
from graphopt.passes.pass_base import Pass
from graphopt.pipelines import Pipeline
from graphopt.schemes import registry
from graphopt.schemes.base import Scheme, Statistics, StoredWeight
from graphopt.schemes.registry import scheme_of, stored_from
from graphopt.schemes.rewrite import replace_weight
from graphopt.schemes.sizes import Parts, tensor_bits
from graphopt.search.mixed_precision.candidates import as_candidates
from graphopt.specs.dtypes import bits_of
from graphopt.specs.model import SpecModel
from graphopt.specs.storage import Codes, StorageRules


# --- 1: the spec ----------------------------------------------------------------------------------
class SignSpec(SpecModel):
    """Each weight is a sign times the mean magnitude of the tensor, times `gain`."""

    gain: float = 1.0


# --- 2: the scheme --------------------------------------------------------------------------------
@dataclass(frozen=True)
class SignedWeight(StoredWeight):
    """One bit per weight and one scale: `scale · (1, −1)[bit]`."""

    signs: Tensor
    scale: Tensor
    size: tuple[int, ...]
    sse: float
    energy: float

    kind: ClassVar[str] = "signs"

    def dense(self) -> Tensor:
        table = torch.stack([self.scale, -self.scale]).reshape(*[1] * len(self.size), 2, 1)
        return torch.ops.graphopt.lut_to_dense(self.signs, table, 1, list(self.size))

    def parts(self) -> Parts:
        count = torch.Size(self.size).numel()
        return Parts(count, Codes(count, 1), 2 * tensor_bits(self.scale))

    def described(self, spec: SignSpec) -> dict[str, Any]:
        return {"status": "palettized", "detail": f"signs with gain {spec.gain}", "n_bits": 1}

    def emit(
        self, edit: Editor, name: str, like: fx.Node, *, before: fx.Node | None = None
    ) -> fx.Node:
        table = torch.stack([self.scale, -self.scale]).reshape(*[1] * len(self.size), 2, 1)
        place: dict[str, Any] = {"like": like, "before": before}
        signs = edit.constant(f"{name}_indices", self.signs, **place)
        lut = edit.constant(f"{name}_lut", table, **place)
        op = torch.ops.graphopt.lut_to_dense.default
        return edit.call(op, signs, lut, 1, list(self.size), **place)


class Signs(Scheme[SignSpec, SignedWeight]):
    """Weights as signs."""

    kind: ClassVar[str] = "signs"
    spec_type = SignSpec
    stored_type = SignedWeight
    searched: ClassVar[bool] = True

    def make(self, weight: Tensor, spec: SignSpec, known: Statistics) -> SignedWeight:
        scale = spec.gain * weight.detach().abs().mean()
        signs = pack((weight < 0).to(torch.uint8), 1)
        return SignedWeight(signs, scale, tuple(weight.shape), 0.0, 0.0).measured(weight.detach())

    def parts(
        self, spec: SignSpec, shape: Sequence[int], output_axis: int, rules: StorageRules
    ) -> Parts:
        count = torch.Size(shape).numel()
        return Parts(count, Codes(count, 1), 2 * bits_of(rules.float_dtype))

    def name_of(self, spec: SignSpec) -> str:
        return f"signs {spec.gain:g}"


# --- 3: the pass ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class StoreSigns(Pass):
    """Replace weights that are annotated with a `SignSpec`, which those in `specs` become."""

    name: ClassVar[str] = "store-signs"
    tolerance: ClassVar[float | None] = None
    specs: Mapping[str, SignSpec]

    def run(self, edit: Editor) -> None:
        rows = []
        for weight in find_weights(edit.gm):
            if weight.name in self.specs:
                wanted = WeightAnnotation(self.specs[weight.name], weight.output_axis)
                annotate_weight(weight.nodes[0], wanted)
            annotation = weight_annotation(weight.nodes[0], SignSpec)
            if annotation is not None:
                spec, known = annotation.spec, Statistics(annotation.output_axis)
                stored = scheme_of(spec).make(weight.tensor, spec, known)
                rows.append(replace_weight(edit, weight, stored, spec))
        edit.record(rows)


# --- 4: its line in SCHEMES -----------------------------------------------------------------------
@pytest.fixture(name="_signs")
def _with_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "SCHEMES", (*registry.SCHEMES, Signs()))


@pytest.fixture(name="model")
def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 4)).eval()


def test_a_scheme_that_is_not_listed_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="SignSpec is no spec of a weight"):
        scheme_of(SignSpec())


@pytest.mark.usefixtures("_signs")
def test_a_listed_scheme_is_priced_named_and_written_down() -> None:
    spec, weight = SignSpec(gain=0.5), torch.randn(12, 20)
    stored = scheme_of(spec).make(weight, spec, Statistics())
    priced = SizeModel(float_dtype=torch.float32).weight_bits(spec, weight.shape, 0)
    assert priced == stored.stored_bits() == 12 * 20 + 2 * 32
    (candidate,) = as_candidates([spec])
    assert candidate.name == "signs 0.5"
    assert type(candidate).from_dict("again", candidate.to_dict()).weight == spec
    again = stored_from(stored.to_state())
    torch.testing.assert_close(again.dense(), weight.sign() * 0.5 * weight.abs().mean())


@pytest.mark.usefixtures("_signs")
def test_a_listed_scheme_works_from_spec_to_saved_file(model: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(3, 20)
    exact = model[0].weight.detach().clone()
    signed = exact.sign() * exact.abs().mean()
    expected = model[2](torch.relu(nn.functional.linear(x, signed, model[0].bias)))
    specs = {"0.weight": SignSpec()}
    program = Pipeline("signs", (StoreSigns(specs),)).run(model, (x,))

    torch.testing.assert_close(program.module()(x), expected)
    row = program.report()["0.weight"]
    error = (exact - signed).square().sum()
    assert row.detail == "signs with gain 1.0"
    priced = SizeModel(float_dtype=torch.float32).weight_bits(SignSpec(), (12, 20), 0)
    assert row.stored_bits == priced == 12 * 20 + 2 * 32
    assert row.snr_db == pytest.approx(float(10 * (exact.square().sum() / error).log10()), abs=1e-4)
    (held,) = stored_values(program.graph_module)
    assert (held.name, held.shape, held.codes) == ("0.weight", (12, 20), Codes(240, 1, "", 1, 32))
    assert stored_weights(program.graph_module) == 1
    rest = 8 * sum(
        each.numel() * 4 for name, each in model.named_parameters() if name != "0.weight"
    )
    assert bits_per_weight(program).total_bits == row.stored_bits + rest

    path = program.save(tmp_path / "signs.pt2")
    torch.testing.assert_close(torch.export.load(path).module()(x), expected)
    assert graphopt.lower(program, "torch").save(tmp_path / "again.pt2").exists()
