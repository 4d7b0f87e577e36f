import torch

from atom_compile.kernels import reorder

from .cases import random_order


def test_channel_i_is_the_one_that_the_order_names() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    order = torch.tensor([2, 0, 1], dtype=torch.int32)
    assert reorder.reorder(x, order).tolist() == [[2.0, 0.0, 1.0], [5.0, 3.0, 4.0]]


def test_operator_passes_opcheck_on_a_strided_input() -> None:
    x = torch.randn(2, 3, 80)[..., 8:72]
    torch.library.opcheck(torch.ops.atom.reorder.default, (x, random_order(64)))
