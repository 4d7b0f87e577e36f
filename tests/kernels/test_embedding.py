import torch

from atom_compile.kernels.packing import GroupLayout, dequantize_weight, pack_weight


def test_rows_of_the_dequantized_table() -> None:
    for width, shape in ((128, ()), (344, (0,)), (256, (2, 3))):
        layout = GroupLayout(width, 128, 0)
        packed = pack_weight(torch.randn(40, width), layout, 4, 0.85)
        ids = torch.randint(0, 40, shape)
        arguments = (ids, packed.weight, packed.weight_scale, width, torch.float32)
        got = torch.ops.atom.embedding(*arguments)
        torch.testing.assert_close(got, dequantize_weight(packed, layout)[ids], rtol=0, atol=0)
        torch.library.opcheck(torch.ops.atom.embedding.default, arguments)
