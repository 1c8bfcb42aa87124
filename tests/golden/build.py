"""The golden files: one tiny checkpoint per format, from arithmetic alone (no solver, no random).

`python -m tests.golden.build` writes them again. They change only with a new format version.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qtool.base import QuantizedTensor
from qtool.checkpoint.manifest import LayerEntry, Manifest, codec
from qtool.checkpoint.place import find_place
from qtool.checkpoint.reader import CheckpointReader
from qtool.checkpoint.spool import Made
from qtool.checkpoint.writer import CheckpointWriter
from qtool.core.packing import codes_to_planes, pack_bits
from qtool.core.place_codes import encode_places
from qtool.formats import (
    affine,
    binary_coding,
    coded_scales,
    dint,
    encrypted_planes,
    mixed_rows,
    ordered_affine,
)
from qtool.scheme import ActivationScheme, BitCode, Shape2D, WeightScheme
from tests.golden.oracles import ORACLES

HERE = Path(__file__).parent
HASHES = HERE / "hashes.json"
SHAPE = Shape2D(6, 70)
SCHEMES: Mapping[str, WeightScheme] = {
    "columns": WeightScheme(num_bits=3, group_size=32),
    "rows": WeightScheme(num_bits=5, group_size=4, group_dim="out_features"),
    "whole": WeightScheme(num_bits=2, group_size=None),
    "symmetric": WeightScheme(num_bits=4, group_size=64, symmetric=True),
}
MIXED_SCHEMES: Mapping[str, WeightScheme] = {
    "columns": WeightScheme(num_bits=5, group_size=32, rows=((5, 1), (3, 2), (2, 3))),
    "rows": WeightScheme(num_bits=8, group_size=4, rows=((8, 1), (6, 1), (4, 1), (3, 1), (1, 2))),
    "whole": WeightScheme(num_bits=2, group_size=None, rows=((2, 6),)),
    "symmetric": WeightScheme(num_bits=4, group_size=64, symmetric=True, rows=((4, 2), (1, 4))),
}
DINT_SCHEMES: Mapping[str, WeightScheme] = {
    **SCHEMES,
    "whole": WeightScheme(num_bits=6, group_size=None),
}


ORDERED_SCHEMES: Mapping[str, WeightScheme] = {
    **SCHEMES,
    "rows": WeightScheme(num_bits=5, group_size=4),
}
CODES = {
    "columns": BitCode(num_inputs=4, num_outputs=5),
    "rows": BitCode(num_inputs=2, num_outputs=5),
    "whole": BitCode(num_inputs=3, num_outputs=3),
    "symmetric": BitCode(num_inputs=8, num_outputs=40),
}
ENCRYPTED_SCHEMES: Mapping[str, WeightScheme] = {
    name: replace(scheme, code=CODES[name]) for name, scheme in SCHEMES.items()
}
SPARSE_SCHEMES: Mapping[str, WeightScheme] = {
    name: replace(
        scheme,
        num_bits=min(scheme.num_bits, 4),
        symmetric=True,
        code=replace(CODES[name], registers=count, corrections=5 * count),
    )
    for count, (name, scheme) in enumerate(SCHEMES.items(), 1)
}


def numbers(high: int, *shape: int) -> Tensor:
    """Return integers 0 .. high - 1 without a visible pattern, the same everywhere."""
    count = int(np.prod(shape))
    return torch.from_numpy((np.arange(1, count + 1) ** 2 * 2654435761 // 1024) % high).view(shape)


def affine_weight(scheme: WeightScheme) -> QuantizedTensor:
    rows, groups = scheme.num_rows(SHAPE), scheme.num_groups(SHAPE)
    size = scheme.group_size or scheme.grouped_length(SHAPE)
    codes = numbers(2**scheme.num_bits, rows, groups, size).to(torch.uint8)
    zeros = numbers(2**scheme.num_bits, groups, rows).T.to(torch.uint8)
    scales = ((numbers(500, rows, groups) + 1) / 512).half()
    return affine.encode_affine(codes, scales, zeros, scheme, SHAPE)


def dint_weight(scheme: WeightScheme) -> QuantizedTensor:
    rows, groups = scheme.num_rows(SHAPE), scheme.num_groups(SHAPE)
    size = scheme.group_size or scheme.grouped_length(SHAPE)
    codes = numbers(2**scheme.num_bits, rows, groups, size).to(torch.uint8)
    zeros = numbers(2**scheme.num_bits - 2, groups, rows).T.to(torch.uint8)
    scales = ((numbers(500, rows, groups) + 1) / 512).half()
    return dint.encode_dint(codes, scales, zeros, scheme, SHAPE)


def ordered_weight(scheme: WeightScheme) -> QuantizedTensor:
    order = (numbers(2**20, SHAPE.in_features)).argsort(stable=True)
    return ordered_affine.encode_ordered(affine_weight(scheme), order)


def binary_weight(scheme: WeightScheme) -> QuantizedTensor:
    rows, groups = scheme.num_rows(SHAPE), scheme.num_groups(SHAPE)
    size = scheme.group_size or scheme.grouped_length(SHAPE)
    codes = numbers(2**scheme.num_bits, rows, groups, size).to(torch.uint8)
    scales = (numbers(500, rows, groups, scheme.num_bits) + 1).sort(-1, descending=True).values
    offsets = (numbers(500, rows, groups) - 250) / 512
    return binary_coding.encode_binary(codes, (scales / 512).half(), offsets.half(), scheme, SHAPE)


def coded_weight(scheme: WeightScheme, shape: Shape2D = SHAPE) -> QuantizedTensor:
    rows, groups = scheme.num_rows(shape), scheme.num_groups(shape)
    size = scheme.group_size or scheme.grouped_length(shape)
    codes = numbers(2**scheme.num_bits, rows, groups, size).to(torch.uint8)
    scales = (numbers(500, rows, groups, scheme.num_bits) + 1).sort(-1, descending=True).values
    offsets = numbers(500, rows, groups, 1) - 250
    row_scales = ((numbers(500, rows) + 500) / 512).half()
    theta = torch.cat([scales, offsets], -1) / 512
    return coded_scales.encode_coded(codes, theta, row_scales, scheme, shape)


def mixed_weight(scheme: WeightScheme) -> QuantizedTensor:
    classes, row_bits = [], []
    for num_bits, count in scheme.rows:
        uniform = replace(scheme, num_bits=num_bits, rows=())
        classes.append(coded_weight(uniform, SHAPE._replace(out_features=count)))
        row_bits += [num_bits] * count
    order = [(5 * row + 2) % len(row_bits) for row in range(len(row_bits))]
    bits = torch.tensor([row_bits[row] for row in order], dtype=torch.uint8)
    return mixed_rows.encode_mixed(classes, bits)


def stepped_weight(format_name: str, scheme: WeightScheme) -> QuantizedTensor:
    parts = {}
    for name, spec in codec(format_name).layout(scheme, SHAPE).items():
        parts[name] = ((numbers(500, *spec.shape) - 100) / 512).half()
        if spec.dtype == "int32":
            width, count = spec.shape[:2]
            length = SHAPE.in_features if name == "codes" else scheme.num_rows(SHAPE)
            codes = numbers(2**width, count, length).to(torch.uint8)
            parts[name] = codes_to_planes(codes, width)
    return QuantizedTensor(format_name, scheme, SHAPE, parts)


def numbered_network(num_outputs: int, num_inputs: int) -> Tensor:
    """Return a network each of whose outputs sees the newest input."""
    network = numbers(2, num_outputs, num_inputs).to(torch.uint8)
    network[:, 0] = 1
    return network


def encrypted_weight(scheme: WeightScheme) -> QuantizedTensor:
    assert scheme.code is not None
    num_outputs, num_inputs = scheme.code.num_outputs, scheme.code.num_inputs
    slices = -(-SHAPE.out_features // num_outputs)
    stored = numbers(2, scheme.num_bits, slices, num_inputs, SHAPE.in_features).to(torch.uint8)
    networks = numbered_network(scheme.num_bits * num_outputs, num_inputs)
    networks = networks.view(scheme.num_bits, num_outputs, num_inputs)
    like = binary_weight(scheme.plain())
    return encrypted_planes.encode_encrypted(pack_bits(stored), networks, like)


def sparse_weight(scheme: WeightScheme) -> QuantizedTensor:
    """Return a weight whose code words and corrections nobody has searched for."""
    kept = numbers(10, *SHAPE) >= 6
    assert scheme.code is not None
    counted = scheme.code.with_found(int(kept.sum()), scheme.code.corrections)
    scheme = replace(scheme, code=counted)
    parts = {}
    for name, spec in codec("sparse_planes").layout(scheme, SHAPE).items():
        if spec.dtype == "int32":
            parts[name] = numbers(2**32, *spec.shape).sub(2**31).to(torch.int32)
    places = numbers(scheme.num_bits * counted.kept, counted.corrections).sort().values
    lows, unary = encode_places(places, scheme.num_bits * counted.kept)
    parts |= {"kept_weights": pack_bits(kept.flatten()[None]), "correction_places": unary[None]}
    parts["correction_lows"] = lows
    scales = binary_weight(scheme.plain()).parts["plane_scales"]
    return QuantizedTensor("sparse_planes", scheme, SHAPE, {**parts, "plane_scales": scales})


WEIGHTS: Mapping[str, Callable[[WeightScheme], QuantizedTensor]] = {
    "affine": affine_weight,
    "binary_coding": binary_weight,
    "coded_scales": coded_weight,
    "dint": dint_weight,
    "encrypted_planes": encrypted_weight,
    "minima": partial(stepped_weight, "minima"),
    "mixed_rows": mixed_weight,
    "nested": partial(stepped_weight, "nested"),
    "ordered_affine": ordered_weight,
    "sparse_planes": sparse_weight,
}


QUANTIZED_INPUTS = "quantized_inputs"
ACTIVATIONS: Mapping[str, ActivationScheme] = {
    "columns": ActivationScheme(),
    "rows": ActivationScheme(num_bits=4, clip_ratio=0.875, rounding=-0.125),
    "whole": ActivationScheme(granularity="tensor", scale=0.03125),
}
"""By layer; one has none."""
GOLDEN = (*WEIGHTS, QUANTIZED_INPUTS)


def schemes_of(format_name: str) -> Mapping[str, WeightScheme]:
    """Return the schemes of the layers of a golden checkpoint."""
    special = {
        "mixed_rows": MIXED_SCHEMES,
        "dint": DINT_SCHEMES,
        "ordered_affine": ORDERED_SCHEMES,
        "encrypted_planes": ENCRYPTED_SCHEMES,
        "sparse_planes": SPARSE_SCHEMES,
    }
    return special.get(format_name, SCHEMES)


def write(golden: str, out_dir: Path) -> None:
    """Write a golden checkpoint: of one format, or of layers whose inputs are quantized."""
    layers, activations = {}, ACTIVATIONS if golden == QUANTIZED_INPUTS else {}
    format_name = "affine" if golden == QUANTIZED_INPUTS else golden
    with CheckpointWriter(find_place(out_dir), {}) as writer:
        for name, scheme in schemes_of(format_name).items():
            tensor = WEIGHTS[format_name](scheme)
            writer.once(name, partial(Made, tensor))
            layers[name] = LayerEntry(
                format=tensor.format,
                scheme=tensor.scheme,
                shape=tensor.shape,
                method="golden",
                activation=activations.get(name),
            )
        writer.once("norm.weight", lambda: Made((numbers(9, 5) / 4).half()))
        manifest = Manifest(tool_version="golden", recipe={}, layers=layers)
        config = {"model_type": "golden", "quantization_config": manifest.to_config()}
        writer.finish({}, config)


def hashes(directory: Path) -> dict[str, str]:
    """Return the sha256 of the files, and of each weight in float64 by the plain decoder."""
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
    }
    reader = CheckpointReader(directory)
    for name, entry in reader.manifest.layers.items():
        tensor = reader.load(name)
        assert isinstance(tensor, QuantizedTensor)
        scheme = entry.scheme
        parts = {part: values.numpy() for part, values in tensor.parts.items()}
        decode = ORACLES[entry.format]
        weight = decode(parts, scheme.num_bits, *SHAPE, scheme.group_size, scheme.group_dim)
        found[f"weight {name}"] = hashlib.sha256(weight.astype("<f8").tobytes()).hexdigest()
    return found


def main() -> None:
    """Write all golden files anew."""
    result = {}
    for name in GOLDEN:
        out_dir = HERE / name
        shutil.rmtree(out_dir, ignore_errors=True)
        write(name, out_dir)
        result[name] = hashes(out_dir)
    HASHES.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(f"wrote {', '.join(result)}\n")


if __name__ == "__main__":
    main()
