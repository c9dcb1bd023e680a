"""Several entry points of one model: one program set, one decision per weight, one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.palettized_nets import uniform
from helpers.state_nets import WIDTH, CachedAttention, noise
from helpers.tiers import cases
from torch import Tensor, nn

import graphopt
from graphopt import rdo
from graphopt.errors import InputError
from graphopt.ir.program_set import ProgramSet
from graphopt.palettization import PalettizationSpec
from graphopt.run.batches import CallSequence
from graphopt.run.set_calls import merged_calls


class Decoder(CachedAttention):
    """Attention to a cache and a wide layer, with a second way in that leaves the cache alone."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back = nn.Linear(WIDTH, 256), nn.Linear(256, WIDTH)

    def mix(self, x: Tensor) -> Tensor:
        return self.back(torch.relu(self.wide(x)))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        return self.mix(super().forward(x, position))

    def prefill(self, x: Tensor, position: Tensor) -> Tensor:
        return self.forward(x, position)


PROMPT = (noise(1, 4, WIDTH), torch.arange(4))
TOKEN = (noise(1, 1, WIDTH, seed=2), torch.tensor([4]))
CALLS: list[tuple[str, Any]] = [
    ("prefill", PROMPT),
    ("decode", TOKEN),
    ("decode", (noise(1, 1, WIDTH, seed=3), torch.tensor([5]))),
]


def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder().eval()


def cached(net: Decoder) -> ProgramSet:
    return graphopt.capture({"prefill": (net.prefill, PROMPT), "decode": (net, TOKEN)})


def mixing(net: Decoder) -> ProgramSet:
    entries = {"few": (net.mix, noise(2, WIDTH)), "many": (net.mix, {"x": noise(5, WIDTH)})}
    return graphopt.capture(entries, dynamic_shapes=None)


def test_entry_points_share_weights_and_state() -> None:
    net = model()
    programs = cached(net)
    assert list(programs) == ["prefill", "decode"]
    assert [each.name for each in programs.state] == ["keys", "values"]
    merged = programs.merged()
    assert len(list(merged.graph_module.parameters())) == len(list(net.parameters()))


def test_merged_entry_points_compute_what_each_does_alone() -> None:
    programs = cached(model())
    merged = programs.merged()
    leaves = merged.example_args
    with torch.no_grad():
        together = merged.module()(*leaves)
        alone = [programs[name].module()(*programs[name].example_args) for name in programs]
        again = [
            part.module()(*part.example_args) for part in programs.split(merged).methods.values()
        ]
    for first, second, third in zip(together, alone, again, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        torch.testing.assert_close(first, third, rtol=0, atol=0)


def test_a_shared_weight_is_decided_once_from_the_data_of_all() -> None:
    programs = cached(model())
    config = uniform(PalettizationSpec(n_bits=4, algorithm="gptq"))
    data = [CallSequence(CALLS)]
    made = graphopt.compress(programs, config=config, calibration_data=data)
    names = [row.name for row in made.report()]
    assert len(names) == len(set(names))
    assert {"wide.weight", "back.weight", "qkv.weight", "out.weight"} <= set(names)
    first, second = (dict(made[name].graph_module.named_buffers()) for name in made)
    shared = [name for name in first if name.endswith("_lut") and name in second]
    assert len(shared) == 4
    assert all(first[name] is second[name] for name in shared)


def test_calls_of_a_sequence_know_the_state_that_other_entry_points_left() -> None:
    net = model()
    programs = cached(net)
    calls = merged_calls(programs, [CallSequence(CALLS)])
    outputs = programs.merged().module()
    del outputs
    assert len(calls) == 2
    with torch.no_grad():
        net(*PROMPT)
    torch.testing.assert_close(
        calls[0].state["state_of_decode.keys"], net.keys, rtol=1e-5, atol=1e-6
    )
    assert bool((calls[0].state["state_of_prefill.keys"] == 0).all())


class Peeking(Decoder):
    """Its second way in reads the cache, and writes nothing."""

    def peek(self, x: Tensor) -> Tensor:
        return self.out((x @ self.keys[0, 0].T) @ self.values[0].transpose(0, 1).flatten(1))


@pytest.mark.integration
@pytest.mark.parametrize(
    "target",
    cases(
        ["coreai", "coreml", "executorch", "torch"],
        default=lambda target: target in ("coreai", "torch"),
    ),
)
def test_state_that_an_entry_point_only_reads_is_no_constant(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Peeking().eval()
    x = noise(1, 3, WIDTH // 4)
    programs = graphopt.capture({"write": (net, PROMPT), "peek": (net.peek, x)})
    small = graphopt.compress(programs, config=uniform(PalettizationSpec(n_bits=4)))
    assert not any("keys" in row.name or "values" in row.name for row in small.report())
    options = {"precision": "float32"} if target == "coreml" else {}
    artifact = graphopt.lower(programs, target, **options)
    later = (noise(1, 4, WIDTH, seed=8), torch.arange(4, 8))
    calls = [("write", PROMPT), ("peek", x), ("write", later), ("peek", x)]
    artifact.save(tmp_path / f"m{artifact.suffix}", verify=calls)
    with torch.no_grad():  # what PyTorch's own module gives behind the same calls
        net(*PROMPT), net(*later)
        module = programs["peek"].module()
        module.keys.copy_(net.keys), module.values.copy_(net.values)
        torch.testing.assert_close(module(x), net.peek(x), rtol=1e-5, atol=1e-6)
    assert artifact.verification.calls == 4


@pytest.mark.integration
@pytest.mark.parametrize(
    ("target", "kind"),
    cases(
        ["coreai", "coreml", "executorch", "torch"],
        ["cached", "mixing"],
        default=lambda target, kind: (kind == "mixing") == (target == "coreml"),
    ),
)
def test_one_file_holds_all_entry_points_and_each_weight_once(
    target: str, kind: str, tmp_path: Path
) -> None:
    programs = {"cached": cached, "mixing": mixing}[kind](model())
    options = {"precision": "float32"} if target == "coreml" else {}
    artifact = graphopt.lower(programs, target, **options)
    path = tmp_path / f"set{artifact.suffix}"
    artifact.save(path)
    alone = graphopt.lower(programs[list(programs)[1]], target, **options)
    alone.save(tmp_path / f"one{alone.suffix}")
    # 74,112 bytes of weights; a second copy would stand out
    assert artifact.size < alone.size + 40_000
    assert artifact.verification is not None
    assert artifact.verification.max_error < 1e-3
    if kind == "cached":
        found = artifact.verify(calls=CALLS)
        assert found.holds
        assert found.calls == 3


@pytest.mark.slow
def test_rate_distortion_decides_shared_weights_once() -> None:
    programs = cached(model())
    config = {"target_bits": 4.7, "candidates": [4], "rounding": {"blocks": "none"}, "draws": 1}
    data = {"prefill": [PROMPT], "decode": [TOKEN]}
    made, report = rdo.optimize(programs, None, data, config, progress=False)
    assert list(made) == ["prefill", "decode"]
    assert report.bits_per_weight <= 4.7
    first, second = (dict(made[name].graph_module.named_buffers()) for name in made)
    shared = [name for name in first if name.startswith("wide") and name in second]
    assert shared
    assert all(first[name] is second[name] for name in shared)
    with torch.no_grad():
        found = made["prefill"].module()(*PROMPT)
        wanted = programs["prefill"].module()(*PROMPT)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 0.2


def test_sizes_are_open_by_entry_point(tmp_path: Path) -> None:
    net = model()
    entries = {"few": (net.mix, noise(2, WIDTH)), "many": (net.mix, noise(5, WIDTH), None)}
    programs = graphopt.capture(entries)
    artifact = graphopt.lower(programs, "torch", shapes={"few": {"x": {0: (2, 7)}}})
    artifact.save(tmp_path / "m.pt2")
    assert artifact.verification.calls == 2 + 3  # examples; both bounds and a size between
    for count in (2, 7):
        assert artifact.verify(
            calls=[("few", noise(count, WIDTH)), ("many", noise(5, WIDTH))]
        ).holds


@pytest.mark.parametrize(
    ("entries", "message"),
    [({}, "no entry points"), ({"a b": 1}, "no name"), ({"a": 1}, "module or method")],
)
def test_what_is_no_entry_point_is_refused(entries: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        graphopt.capture(entries)


def test_entry_points_are_lowered_as_capture_takes_them() -> None:
    net, x = nn.Linear(4, 4), (torch.ones(2, 4),)
    artifact = graphopt.lower({"first": (net, x), "second": (net, x)}, "torch")
    assert list(artifact.methods) == ["first", "second"]


def test_entry_points_of_a_file_are_a_set_again_with_shared_weights(tmp_path: Path) -> None:
    net, path = model(), tmp_path / "m.pt2"
    programs = cached(net)
    graphopt.lower(programs, "torch").save(path)
    read = graphopt.capture(path)
    assert list(read) == ["prefill", "decode"]
    assert [each.name for each in read.state] == ["keys", "values"]
    merged = read.merged()
    assert len(list(merged.graph_module.parameters())) == len(list(net.parameters()))
    for name in read:
        want = programs[name].module()(*programs[name].example_args)
        assert torch.equal(read[name].module()(*read[name].example_args), want)


def test_file_of_entry_points_is_compressed_and_lowered_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    graphopt.lower(mixing(model()), "torch").save(path)
    made = graphopt.compress(path, config={"palettization": {}})
    assert [row.name for row in made.report() if row.stored_bits] == ["wide.weight", "back.weight"]
    artifact = graphopt.lower(path, "torch")
    assert list(artifact.methods) == ["few", "many"]


def test_what_takes_one_program_names_the_entry_points_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    graphopt.lower(mixing(model()), "torch").save(path)
    with pytest.raises(InputError, match=r"few, many.*\['few'\]"):
        graphopt.fit(path, data=[noise(2, WIDTH)], size="1KB", path=tmp_path / "small.pt2")
    with pytest.raises(InputError, match="without example inputs"):
        graphopt.capture(path, (noise(2, WIDTH),))
