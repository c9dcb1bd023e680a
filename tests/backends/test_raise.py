"""Programs in a target's ops become programs in ours again."""

from __future__ import annotations

import copy
import io
import subprocess
import sys

import pytest
import torch
from helpers.tables_on_targets import ARGS, SPECS, UINT8, palettized
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt import passes
from graphopt.backends.lowering import as_program
from graphopt.backends.raising import RaiseToVocabulary, in_vocabulary
from graphopt.ir.captured_module import CapturedModule
from graphopt.ir.neutral_form import neutral_form
from graphopt.palettization import (
    KMeansPalettizer,
    KMeansPalettizerConfig,
    ModuleKMeansPalettizerConfig,
    PalettizationSpec,
)
from graphopt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig
from graphopt.report.bits import bits_per_weight

PRESETS = QuantizerConfig.presets
# targets whose finalized modules hold ops of theirs
OWN_OPS = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("coreai", "coreml")]

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def palettizer() -> KMeansPalettizer:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    # 3 bits are stored as 4 by Core AI, so that the width cannot be read off the table's size
    spec = PalettizationSpec(n_bits=3)
    part = ModuleKMeansPalettizerConfig(op_state_spec={"weight": spec})
    config = KMeansPalettizerConfig(global_config=part)
    made = KMeansPalettizer(net, config)
    made.prepare((X,))
    return made


def tensors_of(gm: CapturedModule) -> dict[str, Tensor]:
    return {**dict(gm.named_parameters()), **dict(gm.named_buffers())}


def namespaces(gm: CapturedModule) -> set[str]:
    return {str(n.target).split(".")[0] for n in gm.graph.nodes if n.op == "call_function"}


def same_program(one: CapturedModule, other: CapturedModule) -> bool:
    mine, theirs = tensors_of(one), tensors_of(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.mark.coreai
def test_finalized_module_is_the_program_that_it_was_made_from(
    palettizer: KMeansPalettizer,
) -> None:
    finalized = palettizer.finalize(backend="coreai")
    assert "coreai" in namespaces(finalized)
    again = as_program(finalized, (X,)).graph_module
    assert same_program(again, palettizer.program().graph_module)
    assert again is not neutral_form(finalized)


@pytest.mark.coreai
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda gm: copy.deepcopy(copy.deepcopy(gm))])
def test_copies_keep_the_program_and_share_nothing(palettizer: KMeansPalettizer, copied) -> None:
    finalized = palettizer.finalize(backend="coreai")
    twin = copied(finalized)
    kept = neutral_form(twin)
    assert kept is not None
    theirs = {tensor.data_ptr() for tensor in tensors_of(finalized).values()}
    theirs |= {tensor.data_ptr() for tensor in tensors_of(neutral_form(finalized)).values()}
    assert not theirs & {tensor.data_ptr() for tensor in tensors_of(kept).values()}
    # what is equal in both forms is held once
    mine = {tensor.data_ptr() for tensor in tensors_of(twin).values()}
    assert {kept.get_parameter(n).data_ptr() for n in ("0.bias", "2.bias")} <= mine


@pytest.mark.coreai
def test_program_is_neither_state_nor_exported_nor_saved(palettizer: KMeansPalettizer) -> None:
    finalized = palettizer.finalize(backend="coreai")
    assert not any(
        "weight_indices" in name and "neutral" in name for name in finalized.state_dict()
    )
    held = sum(t.numel() * t.element_size() for t in finalized.state_dict().values())
    exported = torch.export.export(finalized, (X,))
    assert sum(t.numel() * t.element_size() for t in exported.state_dict.values()) == held
    stream = io.BytesIO()
    torch.save(finalized, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    assert neutral_form(loaded) is None


@pytest.mark.coreai
@pytest.mark.parametrize("change", ["tensor", "graph"])
def test_changed_module_is_raised_from_its_ops(palettizer: KMeansPalettizer, change: str) -> None:
    finalized = palettizer.finalize(backend="coreai")
    if change == "tensor":
        (name,) = [n for n, _ in finalized.named_buffers() if "0.weight" in n and "lut" in n]
        finalized.get_buffer(name).mul_(2)
    else:
        (relu,) = [n for n in finalized.graph.nodes if "relu" in str(n.target)]
        relu.target = torch.ops.aten.tanh.default
        finalized.recompile()
    assert neutral_form(finalized) is None
    again = as_program(finalized, (X,)).graph_module
    assert "coreai" not in namespaces(again)
    torch.testing.assert_close(again(X), finalized(X), rtol=0, atol=0)


@pytest.mark.coreai
def test_module_of_another_type_has_no_program(palettizer: KMeansPalettizer) -> None:
    finalized = palettizer.finalize(backend="coreai")
    assert neutral_form(finalized) is not None
    assert neutral_form(finalized.double()) is None


@pytest.mark.coreai
def test_saved_module_is_raised_by_rules(palettizer: KMeansPalettizer) -> None:
    finalized = palettizer.finalize(backend="coreai")
    exported = torch.export.export(finalized, (X,))
    raised = as_program(exported).graph_module
    assert namespaces(raised) <= {"aten", "graphopt"}
    torch.testing.assert_close(raised(X), finalized(X), rtol=0, atol=0)
    widths = [n.args[2] for n in raised.graph.nodes if "lut_to_dense" in str(n.target)]
    assert widths == [3, 3]


@pytest.mark.coreai
def test_bits_are_those_of_the_program_with_and_without_it(palettizer: KMeansPalettizer) -> None:
    finalized = palettizer.finalize(backend="coreai")
    want = bits_per_weight(palettizer.program()).total_bits
    assert bits_per_weight(finalized).total_bits == want
    finalized.meta.clear()
    assert neutral_form(finalized) is None
    assert bits_per_weight(finalized).total_bits == want


def test_program_in_our_ops_is_itself(palettizer: KMeansPalettizer) -> None:
    gm = palettizer.program().graph_module
    assert in_vocabulary(gm) is gm
    assert not RaiseToVocabulary()(gm).modified
    assert passes.RaiseToVocabulary is RaiseToVocabulary


@pytest.mark.integration
def test_raising_imports_no_toolchain() -> None:
    code = (
        "import sys\n"
        "from graphopt.backends import load_backend\n"
        "from graphopt.backends.registry import targets\n"
        "steps = [step for target in targets() for step in load_backend(target).raise_()]\n"
        "assert steps\n"
        "heavy = ('coreai_torch', 'coreai', 'coremltools', 'executorch', 'torchao')\n"
        "assert not [name for name in heavy if name in sys.modules]\n"
    )
    words = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


QUANTIZED = {
    "w8": PRESETS.w8(),
    "w8a8": PRESETS.w8a8(),
    "w8a8_affine": PRESETS.w8a8_affine(),
    "w4_per_block": PRESETS.w4_per_block(),
    "fp8": PRESETS.fp8(),
    "mxfp4": PRESETS.mxfp4(),
    "unsigned rows": QuantizerConfig(
        global_config=ModuleQuantizerConfig(op_state_spec={"weight": UINT8})
    ),
}


def raised_again(finalized: CapturedModule, example: tuple[Tensor, ...]) -> CapturedModule:
    """A finalized module as it is read from a file, in our vocabulary by rules alone."""
    raised = as_program(torch.export.export(finalized, example)).graph_module
    assert namespaces(raised) <= {"aten", "graphopt", "quantized_decomposed"}
    want, got = finalized(*example), raised(*example)
    for one, other in zip(pytree.tree_leaves(want), pytree.tree_leaves(got), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-6)
    return raised


@pytest.mark.parametrize("target", OWN_OPS)
@pytest.mark.parametrize("name", SPECS)
def test_every_form_of_table_is_raised_from_a_file(target: str, name: str) -> None:
    palettizer = palettized(SPECS[name])
    raised = raised_again(palettizer.finalize(backend=target), ARGS)
    want = bits_per_weight(palettizer.program()).total_bits
    # Core AI holds one factor for each channel of each table where ours are in two places
    assert bits_per_weight(raised).total_bits <= want * 1.2


@pytest.mark.parametrize(
    ("target", "name"),
    [
        pytest.param(target, name, marks=getattr(pytest.mark, target))
        for target in ("coreai", "coreml")
        for name in QUANTIZED
        if target == "coreai" or name not in ("fp8", "mxfp4")  # which Core ML has not
    ],
)
def test_every_form_of_integer_is_raised_from_a_file(target: str, name: str) -> None:
    torch.manual_seed(0)
    quantizer = Quantizer(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), QUANTIZED[name]
    )
    example = torch.randn(4, 64)
    quantizer.prepare((example,))
    quantizer.calibrate([example])
    raised_again(quantizer.finalize(backend=target), (example,))
