from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from graphopt.casting import cast_fp32_to_fp16, cast_int32_to_int16, cast_to_16_bit_precision
from graphopt.errors import InputError


def exported(model: nn.Module, *args: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(model.eval(), args).run_decompositions({})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.norm(self.fc(x)), -1)


def test_weights_inputs_and_outputs_become_float16() -> None:
    model, x = Net(), torch.randn(2, 6)
    program = cast_fp32_to_fp16(exported(model, x))
    assert {t.dtype for t in program.state_dict.values()} == {torch.float16}
    found = program.module()(x.half())
    assert found.dtype is torch.float16
    torch.testing.assert_close(found.float(), model(x), rtol=0, atol=2e-3)


def test_constant_beyond_float16_stays_wide_and_is_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Big(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("huge", torch.tensor([1e6, 2e6, 1.0, 1.0, 1.0, 1.0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * self.huge / 1e6

    model, x = Big(), torch.randn(2, 6)
    with caplog.at_level(logging.WARNING, logger="graphopt"):
        program = cast_fp32_to_fp16(exported(model, x))
    assert "huge stays float32: magnitude 2e+06 exceeds 65504" in caplog.text
    assert program.state_dict["huge"].dtype is torch.float32
    assert program.state_dict["fc.weight"].dtype is torch.float16


@pytest.mark.integration
def test_constant_that_would_vanish_stays_wide() -> None:
    class Small(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("tiny", torch.full((6,), 1e-9))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * self.tiny * 1e9

    model, x = Small(), torch.randn(2, 6)
    program = cast_fp32_to_fp16(exported(model, x))
    assert program.state_dict["tiny"].dtype is torch.float32


def test_mask_values_are_clamped_to_the_range() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(x.masked_fill(x < 0, torch.finfo(torch.float32).min), -1)

    model, x = Masked(), torch.randn(3, 5)
    found = cast_fp32_to_fp16(exported(model, x)).module()(x.half())
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.float(), model(x), rtol=0, atol=2e-3)


def test_ignored_ops_compute_in_float32() -> None:
    model, x = Net(), torch.randn(2, 6)
    program = cast_fp32_to_fp16(exported(model, x), [torch.ops.aten.softmax.int])
    softmax = next(n for n in program.graph.nodes if n.target is torch.ops.aten.softmax.int)
    assert softmax.args[0].meta["val"].dtype is torch.float32
    assert program.module()(x.half()).dtype is torch.float16


def test_integer_constants_are_narrowed_only_where_they_are_converted() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("positions", torch.arange(6))
            self.register_buffer("order", torch.randperm(6))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, self.order] + self.positions.to(torch.float32)

    model, x = Table(), torch.randn(2, 6)
    program = cast_int32_to_int16(exported(model, x))
    assert program.state_dict["positions"].dtype is torch.int16
    assert program.state_dict["order"].dtype is torch.int64
    torch.testing.assert_close(program.module()(x), model(x))


def test_both_casts_return_the_same_program() -> None:
    program = exported(Net(), torch.randn(2, 6))
    assert cast_to_16_bit_precision(program) is program


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(torch.exp(6 * self.fc(x)) + 1)


def chain() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Chain(), torch.randn(3, 48) * 4


def test_neighbours_that_are_ignored_keep_values_beyond_float16() -> None:
    (model, x), a = chain(), torch.ops.aten
    ops = [a.exp.default, a.add.Tensor, a.log.default, a.mul.Tensor]
    program = cast_fp32_to_fp16(exported(model, x), ops)
    found, want = program.module()(x.half()), model(x)
    assert found.dtype is torch.float16
    assert torch.exp(6 * model.fc(x)).max() > 65504
    torch.testing.assert_close(found.float(), want, rtol=0, atol=0.05 * float(want.max()))
    casts = [n for n in program.graph.nodes if n.target is a._to_copy.default]
    assert len(casts) == 2


def test_values_that_overflow_on_calibration_data_stay_wide() -> None:
    model, x = chain()
    plain = cast_to_16_bit_precision(exported(model, x))
    assert not torch.isfinite(plain.module()(x.half())).all()
    program = cast_to_16_bit_precision(exported(model, x), calibration_data=[x * 0.1, (x,)])
    kinds = {n.name: n.meta["val"].dtype for n in program.graph.nodes if n.op == "call_function"}
    assert (kinds["exp"], kinds["log"], kinds["linear"]) == (
        torch.float32,
        torch.float32,
        torch.float16,
    )
    found, want = program.module()(x.half()), model(x)
    torch.testing.assert_close(found.float(), want, rtol=0, atol=0.05 * float(want.max()))


def test_nothing_stays_wide_where_nothing_overflows() -> None:
    model, x = Net(), torch.randn(2, 6)
    plain = cast_fp32_to_fp16(exported(model, x))
    calibrated = cast_fp32_to_fp16(exported(model, x), calibration_data=[x])
    assert str(calibrated.graph) == str(plain.graph)


def test_outputs_and_inputs_beyond_float16_stay_wide() -> None:
    class Square(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * x, torch.tanh(x)

    x = torch.tensor([1.0, 1e5])
    program = cast_fp32_to_fp16(exported(Square(), x), calibration_data=[x])
    square, bounded = program.module()(x)
    assert (square.dtype, bounded.dtype) == (torch.float32, torch.float16)
    torch.testing.assert_close(square, x * x)


def test_filled_in_masks_are_no_overflow() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, m: Tensor) -> Tensor:
            return torch.softmax(x + (1 - m) * torch.finfo(torch.float32).min, -1)

    model, args = Masked(), (torch.randn(3, 5), torch.tensor([1.0, 1, 1, 0, 0]))
    program = cast_fp32_to_fp16(exported(model, *args), calibration_data=[args])
    assert all(n.meta["val"].dtype is torch.float16 for n in program.graph.nodes if "val" in n.meta)
    found = program.module()(args[0].half(), args[1].half())
    torch.testing.assert_close(found.float(), model(*args), rtol=0, atol=2e-3)


def test_calibration_data_of_another_call_is_refused() -> None:
    with pytest.raises(InputError, match="do not fit the program"):
        cast_fp32_to_fp16(exported(Net(), torch.randn(2, 6)), calibration_data=[(1, 2)])


@pytest.mark.integration
def test_lowest_floats_of_a_constant_are_clamped() -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            low = torch.finfo(torch.float32).min
            self.register_buffer("mask", torch.triu(torch.full((5, 5), low), 1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(x + self.mask, -1)

    model, x = Causal(), torch.randn(5, 5)
    program = cast_fp32_to_fp16(exported(model, x))
    assert program.state_dict["mask"].dtype is torch.float16
    torch.testing.assert_close(program.module()(x.half()).float(), model(x), rtol=0, atol=2e-3)
