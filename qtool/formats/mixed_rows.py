"""Format `mixed_rows`: classes of rows, each with bits of its own. docs/format.md, section 11.

For embeddings and heads, whose rows are words: frequent ones get more bits (Extremely Low Bit
Transformer, section 3.1).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qtool.base import Codec, PartSpec, QuantizedTensor
from qtool.core.packing import codes_to_planes, num_words, planes_to_codes
from qtool.errors import SchemeError
from qtool.formats import coded_scales
from qtool.formats._parts import joined, narrowed
from qtool.scheme import Shape2D, WeightScheme

MIXED_ROWS = "mixed_rows"
ROW_CLASSES = "row_classes"


def _kinds(scheme: WeightScheme, shape: Shape2D) -> Iterator[tuple[str, WeightScheme, Shape2D]]:
    """Yield of each class what ends the names of its parts, its scheme and its shape."""
    for num_bits, count in scheme.classes(shape):
        uniform = scheme.uniform(num_bits)
        yield f"_w{num_bits}", uniform, shape._replace(out_features=count)


def _layout(scheme: WeightScheme, shape: Shape2D) -> Mapping[str, PartSpec]:
    """Return the parts of a weight: those of each class, and of which class each row is."""
    counts = tuple(count for _, count in scheme.classes(shape))
    if scheme.group_dim != "in_features" or sum(counts) != shape.out_features:
        raise SchemeError(
            f"Groups run along {scheme.group_dim} and the classes have {sum(counts)} rows; "
            f"in_features and all {shape.out_features} rows of the weight are meant."
        )
    parts: dict[str, PartSpec] = {}
    for end, uniform, cut in _kinds(scheme, shape):
        specs = coded_scales.CODEC.layout(uniform, cut)
        parts |= {f"{name}{end}": spec for name, spec in specs.items()}
    width = (len(counts) - 1).bit_length()
    if width:
        words = num_words(shape.out_features)
        parts[ROW_CLASSES] = PartSpec("int32", (width, words), counts=counts)
    return parts


def class_layouts(scheme: WeightScheme, shape: Shape2D) -> Iterator[Mapping[str, PartSpec]]:
    """Yield the parts of each class, by the names that a `coded_scales` weight has for them."""
    for _, uniform, cut in _kinds(scheme, shape):
        yield coded_scales.CODEC.layout(uniform, cut)


def encode_mixed(classes: Sequence[QuantizedTensor], row_bits: Tensor) -> QuantizedTensor:
    """Join weights whose rows are classes of the rows of one.

    Args:
        classes: Of format `coded_scales` with groups along in_features, by descending width; in
            each the rows are in the order in which the whole has them.
        row_bits: (out_features,) uint8, the width of each row.

    Raises:
        SchemeError: the classes differ in more than width and number of rows, or the rows have
            other widths.
    """
    kept = [each for each in classes if each.shape.out_features]
    rows = tuple((each.scheme.num_bits, each.shape.out_features) for each in kept)
    _check_classes(kept, row_bits, rows)
    scheme = replace(kept[0].scheme, rows=rows)
    shape = kept[0].shape._replace(out_features=len(row_bits))
    parts = {
        f"{name}{end}": part
        for (end, _, _), each in zip(_kinds(scheme, shape), kept, strict=True)
        for name, part in each.parts.items()
    }
    width = (len(kept) - 1).bit_length()
    if width:
        class_of = torch.zeros(256, dtype=torch.uint8, device=row_bits.device)
        for number, (num_bits, _) in enumerate(rows):
            class_of[num_bits] = number
        parts[ROW_CLASSES] = codes_to_planes(class_of[row_bits.long()][None], width).squeeze(1)
    return QuantizedTensor(MIXED_ROWS, scheme, shape, parts)


def _check_classes(
    classes: Sequence[QuantizedTensor], row_bits: Tensor, rows: tuple[tuple[int, int], ...]
) -> None:
    kinds = {
        (each.format, replace(each.scheme, num_bits=1), each.shape.in_features) for each in classes
    }
    found = tuple((int(n), int((row_bits == n).sum())) for n in row_bits.unique().flip(0))
    formats = {each.format for each in classes}
    if len(kinds) != 1 or formats != {coded_scales.CODED_SCALES} or found != rows:
        raise SchemeError(
            f"Classes of (bits, rows) {rows} of {sorted(formats)} don't make a weight whose rows "
            f"have {found}. Give weights of format {coded_scales.CODED_SCALES} and one group size, "
            "each with all rows of its width, the widest first."
        )


def split_rows(tensor: QuantizedTensor) -> tuple[tuple[QuantizedTensor, ...], Tensor]:
    """Return the classes of a weight, and where its rows are in them.

    Returns:
        Weights of format `coded_scales` by descending width, and (out_features,) int64, the place
        of each row in the classes one below the other.
    """
    classes = []
    for end, uniform, shape in _kinds(tensor.scheme, tensor.shape):
        parts = {
            name: tensor.parts[f"{name}{end}"] for name in coded_scales.CODEC.layout(uniform, shape)
        }
        classes.append(QuantizedTensor(coded_scales.CODED_SCALES, uniform, shape, parts))
    return tuple(classes), _class_numbers(tensor).argsort(stable=True).argsort()


def row_bits_of(tensor: QuantizedTensor) -> Tensor:
    """Return the width of each row, (out_features,) uint8."""
    numbers = _class_numbers(tensor)
    widths = [num_bits for num_bits, _ in tensor.scheme.classes(tensor.shape)]
    return torch.tensor(widths, dtype=torch.uint8, device=numbers.device)[numbers]


def _class_numbers(tensor: QuantizedTensor) -> Tensor:
    """Return the number of the class of each row, (out_features,) int64."""
    packed, rows = tensor.parts.get(ROW_CLASSES), tensor.shape.out_features
    if packed is None:
        device = next(iter(tensor.parts.values())).device
        return torch.zeros(rows, dtype=torch.int64, device=device)
    return planes_to_codes(packed.unsqueeze(1), rows).squeeze(0).long()


def _dequantize(tensor: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Return the weight, (out_features, in_features) in `dtype`."""
    classes, places = split_rows(tensor)
    weights = [coded_scales.CODEC.dequantize(each, dtype) for each in classes]
    return torch.cat(weights)[places]


def _cat(tensors: Sequence[QuantizedTensor], dim: int) -> QuantizedTensor:
    """Return weights below one another: classes of one width become one."""
    if len(tensors) == 1:
        return tensors[0]
    joined([replace(each, scheme=each.scheme.uniform(1)) for each in tensors], dim)
    if dim == 1:
        raise SchemeError(
            "Rows of unlike bits aren't put beside one another: they have row scales of their own. "
            "Put them below one another, or dequantize them."
        )
    of_width: dict[int, list[QuantizedTensor]] = {}
    for each in tensors:
        for part in split_rows(each)[0]:
            of_width.setdefault(part.scheme.num_bits, []).append(part)
    widths = sorted(of_width, reverse=True)
    classes = [coded_scales.CODEC.cat(of_width[num_bits], 0) for num_bits in widths]
    return encode_mixed(classes, torch.cat([row_bits_of(each) for each in tensors]))


def _narrow(tensor: QuantizedTensor, dim: int, start: int, length: int) -> QuantizedTensor:
    """Return a part of the rows (dim 0), or of the columns: of each class what it has of them."""
    narrowed(tensor, dim, start, length)
    narrow, (classes, _) = coded_scales.CODEC.narrow, split_rows(tensor)
    if dim == 1:
        return encode_mixed(
            [narrow(each, 1, start, length) for each in classes], row_bits_of(tensor)
        )
    row_bits = row_bits_of(tensor)
    kept = []
    for each in classes:  # rows of a class keep their order, so those of the part are neighbours
        before = int((row_bits[:start] == each.scheme.num_bits).sum())
        count = int((row_bits[start : start + length] == each.scheme.num_bits).sum())
        kept += [narrow(each, 0, before, count)] if count else []
    return encode_mixed(kept, row_bits[start : start + length])


CODEC = Codec(version=1, layout=_layout, dequantize=_dequantize, cat=_cat, narrow=_narrow)
