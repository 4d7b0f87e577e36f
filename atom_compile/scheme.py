"""What the numbers are: bits, groups, outlier channels."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import OptionError, unknown
from .kernels import float8_linear
from .kernels.formats import BLOCK_FORMATS, FORMATS, element_format
from .kernels.packing import BLOCKS_GROUP, GroupLayout
from .kernels.weight_only_linear import least_group_size

# the kernels' tiles; float32 holds a group's sum exactly up to 1024
_GROUP_SIZES = (64, 128, 256, 512, 1024)
_WEIGHT_ONLY_GROUP_SIZES = (32, *_GROUP_SIZES)
# outlier channels come in whole 16-byte loads
_OUTLIER_STEP = 16
# at most one channel in so many is an outlier: 128 of 768 measured best on a narrow model
_LEAST_SHARE = 6
_ACTIVATION_FORMATS = ("int", "e2m1", "e4m3")


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How linears are quantized. Source: Atom (arXiv 2310.19102), section 4.

    weight_bits: 2 to 4, symmetric, one scale per output row and `group_size` input channels; of
        another `weight_format` as many as it has.
    activation_bits: 2 to 8, symmetric, one scale per token and group, found at run time; of another
        `activation_format` as many as it has. Or 16: activations stay as they are (W4A16,
        weight-only); `activation_clip` is then not read.
    group_size: 64, 128, 256, 512 or 1024 channels; with 16-bit activations 32 as well, but weights
        of 6 bits need at least 64 and of 5 bits 128.
    outlier_channels: this many input channels of the largest magnitude are INT8 in weight and
        activation. A narrow layer takes fewer (see `layout`); 0 turns outlier channels off.
    weight_clip, activation_clip: the share of a group's largest magnitude that the grid spans, in
        (0, 1]. Atom's own are 0.85 and 0.9; the defaults measured better on the models that this
        project tests with. Calibration with GPTQ searches for both and does not read them.
    int8_share: of a linear's blocks of channels (its groups, and its outliers as one more) at most
        this share has INT8 activations. Calibration deals out the same number over all linears by
        measured noise. Source: COMET (arXiv 2410.12168), section 4.
    rotation: so many channels of a group at a time go through a Hadamard transform before they are
        quantized, and the weight's columns with them; a power of two that divides `group_size`.
        The groups' channels are then dealt out evenly instead of sorted, and the outlier channels
        turned among themselves. None is Atom's own. See kernels/rotate.py.
    two_level: a token has one scale for all of its groups, and a weight's group scales are small
        integers of a scale per row: tensor cores then add up all groups in integers, which is much
        faster for many tokens. Needs 8-bit activations and 4-bit weights, whose clip is searched
        for; `weight_clip` is not read. Source: QServe (arXiv 2405.04532), section 4.1.
    symmetric: False gives each group of a weight a zero point, so that all 16 codes are used: of
        prose-llama-25m with GPTQ the divergence falls by an eighth. Needs 16-bit activations.
    act_order: with 16-bit activations, channels in descending order of magnitude, so that GPTQ
        rounds the most important ones first and groups hold alike ones; at the price of a reorder
        of each linear's input. Otherwise their channels stay as they are. Source: the authors' code
        of GPTQ (arXiv 2210.17323), where it has this name.
    weight_format: "int", or a floating-point format of kernels/formats.py: "e3m2" or "e2m3" of 6
        bits, "e2m2" of 5, "e2m1" of 4 (FP4). Its clips are searched for; `weight_clip` is not read.
        "e2m1" goes with quantized activations too, those of 6 bits with e4m3; all others need
        16-bit activations, and none goes with `two_level`. Source: FP6-LLM (arXiv 2401.14112). Or a
        format of blocks, whose scales have 8 bits, see kernels/block_formats.py: "mxfp4" in groups
        of 32, "nvfp4" of 16, with 16-bit activations.
    activation_format: "int"; or "e2m1" of 4 bits, which takes the place of INT4 alone: outlier
        channels and `int8_share` are INT8 all the same. Source: Atom (arXiv 2310.19102), which
        measures FP4 beside INT4. Or "e4m3" (FP8) with one scale per token, found at run time: then
        `activation_bits` is 8, `weight_format` of 6 bits with one scale per output row, and
        channels stay as they are. `activation_clip` is not read, and the groups, of 128 channels,
        only say how a weight lies in memory.
    """

    weight_bits: int = 4
    activation_bits: int = 4
    group_size: int = 128
    outlier_channels: int = 128
    weight_clip: float = 0.75
    activation_clip: float = 0.85
    int8_share: float = 0.0
    rotation: int | None = None
    two_level: bool = False
    symmetric: bool = True
    act_order: bool = False
    weight_format: str = "int"
    activation_format: str = "int"

    def __post_init__(self) -> None:
        if self.weight_format == "int" and self.weight_bits not in range(2, 5):
            raise OptionError(f"weight_bits is {self.weight_bits}; INT4 storage holds 2, 3 or 4")
        if self.activation_bits not in (*range(2, 9), 16):
            raise OptionError(
                f"activation_bits is {self.activation_bits}; it must be 2 to 8, or 16"
            )
        sizes = _WEIGHT_ONLY_GROUP_SIZES if self.activation_bits == 16 else _GROUP_SIZES
        if self.weight_format not in BLOCK_FORMATS and self.group_size not in sizes:
            raise OptionError(f"group_size is {self.group_size}; it must be one of {sizes}")
        if self.outlier_channels < 0 or self.outlier_channels % _OUTLIER_STEP:
            raise OptionError(
                f"outlier_channels is {self.outlier_channels}; "
                f"it must be 0 or a multiple of {_OUTLIER_STEP}"
            )
        if not 0.0 <= self.int8_share <= 1.0:
            raise OptionError(f"int8_share is {self.int8_share}; it must be 0 to 1")
        for name in ("weight_clip", "activation_clip"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise OptionError(
                    f"{name} is {getattr(self, name)}; it must be over 0 and at most 1"
                )

        self._check_rotation()
        self._check_two_level()
        self._check_weight_only()
        if self.weight_format != "int":
            self._check_weight_format()
        if self.activation_format != "int":
            self._check_activation_format()

    def _check_weight_format(self) -> None:
        name = self.weight_format
        if name not in FORMATS and name not in BLOCK_FORMATS:
            raise OptionError(
                unknown("weight_format", str(name), ["int", *FORMATS, *BLOCK_FORMATS])
            )
        bits, least = element_format(name).bits, least_group_size(name)
        grouped = self.activation_bits != 16 and self.activation_format in ("int", "e2m1")
        if grouped and name != "e2m1":
            in_e4m3 = " or activation_format='e4m3'" * (name in float8_linear.WEIGHT_FORMATS)
            raise OptionError(
                f"weight_format={name!r} needs activation_bits=16{in_e4m3}; got "
                f"activation_bits={self.activation_bits}, "
                f"activation_format={self.activation_format!r}"
            )
        if self.two_level:
            raise OptionError(f"two_level needs weight_format='int'; it is {name!r}")
        if self.weight_bits != bits:
            raise OptionError(
                f"weight_bits is {self.weight_bits}; with weight_format={name!r} it must be {bits}"
            )
        if name in BLOCK_FORMATS and self.group_size != BLOCK_FORMATS[name].size:
            raise OptionError(
                f"group_size is {self.group_size}; with weight_format={name!r} it must be "
                f"{BLOCK_FORMATS[name].size}"
            )
        if name in FORMATS and self.group_size < least:
            raise OptionError(
                f"group_size is {self.group_size}; with weight_format={name!r} it must be at least "
                f"{least}"
            )
        if not self.symmetric:
            raise OptionError(f"symmetric=False: weight_format={name!r} has no zero points")

    def _check_activation_format(self) -> None:
        name = self.activation_format
        if name not in _ACTIVATION_FORMATS:
            raise OptionError(unknown("activation_format", str(name), _ACTIVATION_FORMATS))
        if name == "e4m3":
            self._check_e4m3()
        elif self.activation_bits != FORMATS[name].bits:
            raise OptionError(
                f"activation_bits is {self.activation_bits}; with activation_format={name!r} it "
                f"must be {FORMATS[name].bits}"
            )

    def _check_e4m3(self) -> None:
        formats = float8_linear.WEIGHT_FORMATS
        if self.weight_format not in formats:
            raise OptionError(
                f"weight_format is {self.weight_format!r}; with activation_format='e4m3' it must "
                f"be one of {formats}"
            )
        plain: dict[str, object] = {
            "activation_bits": 8,
            "group_size": float8_linear.GROUP_SIZE,
            "outlier_channels": 0,
            "int8_share": 0.0,
            "rotation": None,
            "two_level": False,
        }
        for field, wanted in plain.items():
            if getattr(self, field) != wanted:
                raise OptionError(
                    f"{field} is {getattr(self, field)}; with activation_format='e4m3' it must be "
                    f"{wanted}"
                )

    def _check_two_level(self) -> None:
        if self.two_level and (self.weight_bits, self.activation_bits) != (4, 8):
            raise OptionError(
                f"two_level needs weight_bits=4 and activation_bits=8; they are {self.weight_bits} "
                f"and {self.activation_bits}"
            )
        if self.two_level and self.int8_share:
            raise OptionError("with two_level all activations are INT8: leave int8_share at 0")

    def _check_weight_only(self) -> None:
        weight_only = self.activation_bits == 16
        for name, wanted in (("symmetric", False), ("act_order", True)):
            if not weight_only and getattr(self, name) == wanted:
                raise OptionError(
                    f"{name}={wanted} needs activation_bits=16; it is {self.activation_bits}"
                )
        for name in ("outlier_channels", "int8_share", "rotation"):
            if weight_only and getattr(self, name):
                raise OptionError(
                    f"{name} is {getattr(self, name)}; with activation_bits=16 no activation is "
                    "rounded, and none needs it: leave it out"
                )

    def _check_rotation(self) -> None:
        if self.rotation is None:
            return
        power_of_two = self.rotation > 1 and self.rotation & (self.rotation - 1) == 0
        if not power_of_two or self.group_size % self.rotation:
            raise OptionError(
                f"rotation is {self.rotation}; it must be None or a power of two that divides "
                f"group_size, which is {self.group_size}"
            )

    @classmethod
    def preset(cls, name: str) -> Scheme:
        """A scheme by name.

        `w4a4`: Atom. `w4a4-rotated`: the same with rotated channels, half the loss (of
            prose-llama-25m with GPTQ: 1.019x perplexity, as measured by benchmarks/accuracy.py).
        `w4a4-fp4`: Atom's variant in floating point, E2M1 for weights and activations.
        `w4ax`: COMET, at most a quarter of the blocks of channels in INT8. `w4ax-rotated`: the
            same with rotated channels.
        `w4a8`: INT8 activations without clip, 48 outlier channels.
        `w4a8-two-level`: one scale a token, so that sums stay integers; rotated, since what is
        large among so many channels would leave the others few codes.
        `w4a16`: weights alone, in 4 bits, as GPTQ and AWQ do.
        `w6a8`: weights of 6 bits (E2M3), one scale a row, and activations in FP8, one a token.
            `w6a8-e3m2`: in the 6 bits of FP6-LLM.
        `w6a16`, `w5a16`, `w4a16-fp4`: weights alone, in floating point of 6 (E2M3), 5 (E2M2) and 4
            bits (E2M1). `w6a16-e3m2`: in the 6 bits of FP6-LLM.
        `mxfp4`, `nvfp4`: weights alone, in E2M1 with scales of 8 bits: 4.25 and 4.5 bits a weight.
        """
        if name not in PRESETS:
            raise OptionError(unknown("scheme", name, PRESETS))
        return PRESETS[name]

    @classmethod
    def of(cls, scheme: Scheme | str) -> Scheme:
        return scheme if isinstance(scheme, Scheme) else cls.preset(scheme)

    def layout(self, width: int) -> GroupLayout:
        """The cut of `width` input channels; at most width / 6 of them become outliers.

        Its groups are those that are packed: two of NVFP4's blocks are one.
        """
        fitting = width // _LEAST_SHARE // _OUTLIER_STEP * _OUTLIER_STEP
        outliers = min(self.outlier_channels, fitting)
        group_size = BLOCKS_GROUP if self.weight_format in BLOCK_FORMATS else self.group_size
        per_token = self.two_level or self.activation_format == "e4m3"
        return GroupLayout(width, group_size, outliers, per_token)

    @property
    def sorts_channels(self) -> bool:
        """Whether channels are sorted by magnitude, for alike ones to share a scale.

        Not for activations in 16 bits or in e4m3, which need none of it.
        """
        return self.activation_bits < 16 and self.activation_format != "e4m3"

    def int8_groups(self, layout: GroupLayout) -> int:
        """How many groups are INT8 where calibration did not say."""
        blocks = int(self.int8_share * layout.num_scales)
        return max(0, blocks - int(layout.outlier_channels > 0))


def _floating_point(name: str, activation_bits: int = 16, activation_format: str = "int") -> Scheme:
    return Scheme(
        weight_bits=element_format(name).bits,
        activation_bits=activation_bits,
        group_size=BLOCK_FORMATS[name].size if name in BLOCK_FORMATS else 128,
        outlier_channels=0,
        weight_clip=1.0,
        activation_clip=1.0,
        weight_format=name,
        activation_format=activation_format,
    )


PRESETS = {
    "w4a4": Scheme(),
    # of E2M1, no other clip leaves less divergence (benchmarks/formats.py)
    "w4a4-fp4": Scheme(weight_format="e2m1", activation_format="e2m1", activation_clip=1.0),
    # at most a quarter of the blocks in INT8, the outliers among them
    "w4ax": Scheme(int8_share=0.25),
    # a rotated group is bell-shaped whatever it was: of 128 such values 4 bits keep most at 0.8
    "w4a4-rotated": Scheme(rotation=128, activation_clip=0.8, weight_clip=0.8),
    "w4ax-rotated": Scheme(rotation=128, activation_clip=0.8, weight_clip=0.8, int8_share=0.25),
    # INT8 groups need fewer outlier channels; the fewer share one scale, the better they are kept
    "w4a8": Scheme(activation_bits=8, outlier_channels=48, activation_clip=1.0),
    # unrotated, prose-llama-25m with injected outliers loses 2 %: they share one scale as well
    "w4a8-two-level": Scheme(activation_bits=8, activation_clip=1.0, rotation=128, two_level=True),
    # of prose-llama-25m, rounded to nearest, 0.85 leaves the least divergence
    "w4a16": Scheme(activation_bits=16, outlier_channels=0, activation_clip=1.0, weight_clip=0.85),
    # in groups of 128, E2M3 leaves a third of the divergence of E3M2 (benchmarks/formats.py)
    "w6a16": _floating_point("e2m3"),
    "w6a16-e3m2": _floating_point("e3m2"),
    # of prose-llama-25m, rounded to nearest, E2M3 leaves half the divergence of E3M2
    "w6a8": _floating_point("e2m3", 8, "e4m3"),
    "w6a8-e3m2": _floating_point("e3m2", 8, "e4m3"),
    "w5a16": _floating_point("e2m2"),
    "w4a16-fp4": _floating_point("e2m1"),
    "mxfp4": _floating_point("mxfp4"),
    "nvfp4": _floating_point("nvfp4"),
}


_KV_BITS = (4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class KVScheme:
    """How keys and values are kept. Source: Atom (arXiv 2310.19102), section 4.3.

    bits: 4 or 8, asymmetric, one scale and minimum per token and head; or 16, as they are.
    group_size: channels of a head that share a scale; the whole head by default.
    keys_before_rope: quantize keys as they were before RoPE, as Atom does. After RoPE is the
        default: as measured it loses less (1.035x perplexity against 1.041x, prose-llama-25m in
        W4A4) and is faster, as a key need not be rotated each time it is read.
    residual: so many of the most recent tokens are read in 16 bits.
    rotate: keys and values go through a Hadamard transform of each head before they are quantized,
        queries too; what attention gives is turned back. It spreads the few large channels that
        keys have; a 4-bit cache then loses less than half. See kernels/rotate.py.
    """

    bits: int = 4
    group_size: int | None = None
    keys_before_rope: bool = False
    residual: int = 0
    rotate: bool = False

    def __post_init__(self) -> None:
        if self.bits not in _KV_BITS:
            raise OptionError(f"bits is {self.bits}; it must be one of {_KV_BITS}")
        if self.residual < 0:
            raise OptionError(f"residual is {self.residual}; it must be 0 or more")
        if self.rotate and self.keys_before_rope:
            raise OptionError(
                "rotate turns keys as they are after RoPE: leave keys_before_rope off"
            )
        sixteen_bits_need = self.keys_before_rope or self.residual or self.group_size or self.rotate
        if self.bits == 16 and sixteen_bits_need:
            raise OptionError("with 16 bits nothing is quantized: leave the other fields alone")

    @classmethod
    def of(cls, scheme: KVScheme | str) -> KVScheme:
        """Itself, or the preset "kv4", "kv4-rotated", "kv8" or "kv16"."""
        if isinstance(scheme, KVScheme):
            return scheme
        if scheme not in KV_PRESETS:
            raise OptionError(unknown("KV scheme", str(scheme), KV_PRESETS))
        return KV_PRESETS[scheme]

    def groups(self, head_dim: int) -> int:
        """How many scales a head has."""
        size = self.group_size or head_dim
        if size < 1 or head_dim % size or (self.bits == 4 and head_dim % 2):
            raise OptionError(
                f"heads of {head_dim} channels cannot be cut into groups of {size} in "
                f"{self.bits} bits: group_size must divide the head"
            )
        return head_dim // size


KV_PRESETS = {f"kv{bits}": KVScheme(bits=bits) for bits in _KV_BITS}
KV_PRESETS["kv4-rotated"] = KVScheme(bits=4, rotate=True)
