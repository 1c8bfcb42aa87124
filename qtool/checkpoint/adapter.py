"""What an adapter says of a quantized layer, and what becomes of that layer's weight.

An adapter never touches planes. Of a layer it has some of these parts:

- `plane_scales` (count, *parameters) float16: of its first planes, in the place of their own;
- `plane_offsets` (*parameters) float16: in the place of its own;
- `down` (rank, in_features) and `up` (out_features, rank) float16: x @ down.T @ up.T is added to
  what the layer makes of x.

`parameters` are as the format `binary_coding` stores them. A weight of another format is taken as
the binary-coded one that it is (docs/format.md, section 10).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.checkpoint.manifest import codec
from qtool.core import grouping
from qtool.core.binary_coding import assign
from qtool.formats._in_planes import in_planes, opened_weight
from qtool.formats.binary_coding import BINARY_CODING, encode_binary

PLANE_SCALES, PLANE_OFFSETS, RANK_DOWN, RANK_UP = "plane_scales", "plane_offsets", "down", "up"
ADAPTER_PARTS = (PLANE_SCALES, PLANE_OFFSETS, RANK_DOWN, RANK_UP)
LayerAdapter = Mapping[str, Tensor]
"""What an adapter says of one layer, by part."""


def with_adapter(tensor: QuantizedTensor, changes: LayerAdapter) -> QuantizedTensor:
    """Return a weight with an adapter in it; exact, but for what is of low rank.

    With that, each weight takes the nearest level there is: small changes are lost.

    Raises:
        SchemeError: as `in_planes`.
    """
    new = rescaled(tensor, changes)
    if RANK_UP not in changes:
        return new
    binary = in_planes(new)
    scheme, shape, parts = binary.scheme, binary.shape, binary.parts
    wanted = codec(BINARY_CODING).dequantize(binary, torch.float32)
    wanted = wanted + changes[RANK_UP].float() @ changes[RANK_DOWN].float()
    groups = grouping.split(grouping.to_rows(wanted, scheme), scheme.group_size)
    scales = grouping.to_stored(parts[PLANE_SCALES], scheme).permute(1, 2, 0)
    offsets = torch.zeros_like(scales[..., 0])
    if PLANE_OFFSETS in parts:
        offsets = grouping.to_stored(parts[PLANE_OFFSETS], scheme)
    codes = assign(groups.flatten(0, 1), scales.flatten(0, 1), offsets.flatten())
    return encode_binary(codes.view(groups.shape), scales, offsets, scheme, shape)


def has_scales(changes: LayerAdapter) -> bool:
    """Return whether an adapter has scales or offsets of a layer."""
    return PLANE_SCALES in changes or PLANE_OFFSETS in changes


def rescaled(tensor: QuantizedTensor, changes: LayerAdapter) -> QuantizedTensor:
    """Return a weight as backends run it, with the scales and offsets of an adapter.

    Its planes are the same tensor, unless they are encoded. A weight of which the adapter replaces
    nothing is returned as it is, but for that.
    """
    if not has_scales(changes):
        return opened_weight(tensor)
    binary = in_planes(tensor)
    parts = dict(binary.parts)
    if PLANE_SCALES in changes:
        new = changes[PLANE_SCALES].to(parts[PLANE_SCALES].device)
        parts[PLANE_SCALES] = torch.cat([new, parts[PLANE_SCALES][len(new) :]])
    if PLANE_OFFSETS in changes:
        parts[PLANE_OFFSETS] = changes[PLANE_OFFSETS].to(parts[PLANE_SCALES].device)
    return QuantizedTensor(BINARY_CODING, binary.scheme, binary.shape, parts)
