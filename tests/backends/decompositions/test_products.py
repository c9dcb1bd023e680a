"""Products with matrices of experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim

from graphopt.backends.decompositions.products import grouped_mm


class Experts(nn.Module):
    """Rows sorted by their expert; one expert has none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 8, 5))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return grouped_mm(x, self.experts, ends)


def test_rows_are_multiplied_by_the_matrix_of_their_expert_at_every_number_of_rows() -> None:
    torch.manual_seed(0)
    model = Experts().eval()
    sizes = {"x": {0: Dim.AUTO}, "ends": None}
    example = (torch.randn(9, 8), torch.tensor([4, 4, 9]))
    program = torch.export.export(model, example, dynamic_shapes=sizes).module()
    for rows, ends in ((9, [4, 4, 9]), (12, [0, 7, 12])):
        x = torch.randn(rows, 8)
        parts = zip([0, *ends], ends, model.experts, strict=False)
        wanted = torch.cat([x[first:last] @ matrix for first, last, matrix in parts])
        torch.testing.assert_close(program(x, torch.tensor(ends)), wanted)
