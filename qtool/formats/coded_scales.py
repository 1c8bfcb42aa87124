"""Format `coded_scales`: binary coding with scales of few bits. docs/format.md, section 5."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qtool.base import Codec, PartSpec, QuantizedTensor, Trainable
from qtool.core import coded_scales, grouping, learned
from qtool.core.packing import codes_to_planes, num_words, pack_bits, unpack_bits
from qtool.formats import binary_coding
from qtool.formats._parts import DIMS, cat_planes, joined, narrow_planes, narrowed
from qtool.scheme import Shape2D, WeightScheme

CODED_SCALES = "coded_scales"


def _widths(scheme: WeightScheme) -> list[int]:
    """Return the bits of each code of a group: of its plane scales and, last, of its offset."""
    widths = coded_scales.code_widths(scheme.num_bits)
    return widths[:-1] if scheme.symmetric else widths


def _layout(scheme: WeightScheme, shape: Shape2D) -> Mapping[str, PartSpec]:
    """Return the parts of a weight: bit planes, the codes of its parameters, a scale per row."""
    rows, groups = scheme.num_rows(shape), scheme.num_groups(shape)
    planes = binary_coding.CODEC.layout(scheme, shape)["bit_planes"]
    return {
        "bit_planes": planes,
        "scale_codes": PartSpec("int32", (sum(_widths(scheme)), groups, num_words(rows))),
        "row_scales": PartSpec("float16", (rows,), lowest=0),
    }


def encode_coded(
    codes: Tensor, theta: Tensor, row_scales: Tensor, scheme: WeightScheme, shape: Shape2D
) -> QuantizedTensor:
    """Pack solver results.

    Args:
        codes: (rows, num_groups, group_size) uint8; bit num_bits-1-i is the sign of plane i.
        theta: (rows, num_groups, num_bits + 1) float32: plane scales, >= 0 and descending, and the
            offset, which is ignored if the scheme is symmetric. The nearest multiples are stored.
        row_scales: (rows,) float16.
        scheme: Bits and grouping.
        shape: Shape of the weight.
    """
    matrix = grouping.to_rows(grouping.join(codes, scheme.grouped_length(shape)), scheme)
    multiples = coded_scales.all_to_multiples(theta, row_scales)
    planes = codes_to_planes(matrix, scheme.num_bits)
    return _packed(planes, multiples, row_scales, scheme, shape)


def _packed(
    bit_planes: Tensor, multiples: Tensor, row_scales: Tensor, scheme: WeightScheme, shape: Shape2D
) -> QuantizedTensor:
    """Return a weight; multiples are (rows, num_groups, num_bits), or with the offset one more."""
    bits: list[Tensor] = []
    bounds = coded_scales.limits(scheme.num_bits)
    for found, width, (low, _) in zip(multiples.unbind(-1), _widths(scheme), bounds, strict=False):
        code = (found.T - low).to(torch.int32)  # (num_groups, rows)
        bits += [(code >> bit) & 1 for bit in reversed(range(width))]
    parts = {
        "bit_planes": bit_planes,
        "scale_codes": pack_bits(torch.stack(bits)),
        "row_scales": row_scales.contiguous(),
    }
    return QuantizedTensor(CODED_SCALES, scheme, shape, parts)


def _multiples(tensor: QuantizedTensor) -> Tensor:
    """Return the multiples that are stored, (rows, num_groups, unknowns) float32."""
    scheme, widths = tensor.scheme, _widths(tensor.scheme)
    bits = unpack_bits(tensor.parts["scale_codes"], scheme.num_rows(tensor.shape))
    found, bounds = [], coded_scales.limits(scheme.num_bits)
    for code, (low, _) in zip(bits.split(widths), bounds, strict=False):
        powers = 2.0 ** torch.arange(len(code) - 1, -1, -1, device=bits.device)
        found.append(low + torch.einsum("b,bgr->rg", powers, code.float()))
    return torch.stack(found, -1)


def to_binary(tensor: QuantizedTensor) -> QuantizedTensor:
    """Return the same weight, to the bit, in format `binary_coding`."""
    scheme, parts = tensor.scheme, tensor.parts
    row_scales = parts["row_scales"][:, None, None]
    theta = coded_scales.from_multiples(_multiples(tensor), row_scales, scheme.num_bits)
    stored = grouping.to_stored(theta.permute(2, 0, 1), scheme)
    plain = {"bit_planes": parts["bit_planes"], "plane_scales": stored[: scheme.num_bits]}
    if not scheme.symmetric:
        plain["plane_offsets"] = stored[-1]
    return QuantizedTensor(binary_coding.BINARY_CODING, scheme, tensor.shape, plain)


def _dequantize(tensor: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Return the weight, (out_features, in_features) in `dtype`."""
    return binary_coding.CODEC.dequantize(to_binary(tensor), dtype)


def _cat(tensors: Sequence[QuantizedTensor], dim: int) -> QuantizedTensor:
    """Return weights below one another (dim 0), or beside one another.

    Where that makes rows of groups longer, a row has several scales: the result is binary-coded.
    """
    scheme, shape = tensors[0].scheme, joined(tensors, dim)
    if DIMS[dim] == scheme.group_dim and len(tensors) > 1:
        return binary_coding.CODEC.cat([to_binary(tensor) for tensor in tensors], dim)
    multiples = torch.cat([_multiples(tensor) for tensor in tensors])
    row_scales = torch.cat([tensor.parts["row_scales"] for tensor in tensors])
    return _packed(cat_planes(tensors, "bit_planes", dim), multiples, row_scales, scheme, shape)


def _narrow(tensor: QuantizedTensor, dim: int, start: int, length: int) -> QuantizedTensor:
    """Return a part of the rows (dim 0), or of the columns."""
    scheme, shape = tensor.scheme, narrowed(tensor, dim, start, length)
    multiples, row_scales = _multiples(tensor), tensor.parts["row_scales"]
    if DIMS[dim] == scheme.group_dim:
        size = scheme.group_size or tensor.shape[dim]
        multiples = multiples[:, start // size : -(-(start + length) // size)]
    else:
        multiples = multiples[start : start + length]
        row_scales = row_scales[start : start + length]
    planes = narrow_planes(tensor.parts["bit_planes"], dim, start, length)
    return _packed(planes, multiples, row_scales.clone(), scheme, shape)


def _trainable(tensor: QuantizedTensor) -> Trainable:
    """Let scales and offsets be learned, straight through their rounding; row scales stay."""
    plain, row_scales = binary_coding.trainable(to_binary(tensor)), tensor.parts["row_scales"]
    scheme, shape = tensor.scheme, tensor.shape

    def theta(values: Mapping[str, Tensor]) -> Tensor:
        scales = binary_coding.descending(values["plane_scales"])
        offsets = values.get("plane_offsets", torch.zeros_like(scales[0]))
        return torch.cat([scales, offsets.unsqueeze(0)]).movedim(0, -1)

    def planes(values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        wanted = theta(values)
        steps = coded_scales.rounded(wanted.detach(), row_scales)
        found = learned.with_gradient(steps, wanted).movedim(-1, 0)
        return found[:-1], found[-1]

    return replace(
        plain,
        planes=planes,
        stored=lambda values, codes: encode_coded(codes, theta(values), row_scales, scheme, shape),
    )


CODEC = Codec(
    version=1,
    layout=_layout,
    dequantize=_dequantize,
    cat=_cat,
    narrow=_narrow,
    trainable=_trainable,
)
