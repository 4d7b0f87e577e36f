from .weight_only_linear import (
    _unpacking as unpacking,
    _placing as placing,
    _registers as registers,
    _registers_of_planes as registers_of_planes,
    _num_parts as num_parts,
    _power_of_gap as power_of_gap,
    _twice as twice,
)
