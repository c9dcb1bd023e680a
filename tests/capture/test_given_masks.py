"""Torch's own transformers with masks, which torch.export cannot take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import transformer

import graphopt
from graphopt.capture.given_masks import masks_as_given

causal = nn.Transformer.generate_square_subsequent_mask


class _Both(nn.Module):
    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.net = nn.Transformer(16, 2, 2, 2, 32, 0.0, batch_first=True, norm_first=norm_first)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.net(source, target, tgt_mask=causal(target.shape[1]))


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.net(x, mask=mask)


class _Told(_Encoder):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.net(x, mask=mask, is_causal=True)


OTHER = causal(5).flip(0).flip(1)
CASES = {
    "causal mask of the model's own": (
        _Both(norm_first=True),
        (torch.randn(2, 6, 16), torch.randn(2, 5, 16)),
    ),
    "norms behind": (_Both(norm_first=False), (torch.randn(2, 6, 16), torch.randn(2, 5, 16))),
    "causal mask as an input": (_Encoder(), (torch.randn(2, 5, 16), causal(5))),
    "another mask": (_Encoder(), (torch.randn(2, 5, 16), OTHER)),
    "said to be causal": (_Told(), (torch.randn(2, 5, 16), causal(5))),
}


@pytest.mark.parametrize("name", CASES)
def test_programs_compute_what_their_models_do(name: str) -> None:
    model, example = CASES[name]
    model.eval()
    with torch.no_grad():
        wanted = model(*example)
        torch.testing.assert_close(graphopt.capture(model, example).module()(*example), wanted)


def test_a_mask_that_is_an_input_is_used_as_it_comes() -> None:
    model, (x, mask) = _Encoder().eval(), CASES["causal mask as an input"][1]
    module = graphopt.capture(model, (x, mask)).module()
    with torch.no_grad():
        torch.testing.assert_close(module(x, OTHER), model(x, OTHER))
        assert not torch.allclose(module(x, OTHER), module(x, mask))


def test_torch_looks_into_masks_again_afterwards() -> None:
    before = transformer._detect_is_causal_mask
    with pytest.raises(RuntimeError, match="in between"), masks_as_given():
        raise RuntimeError("in between")
    assert transformer._detect_is_causal_mask is before
