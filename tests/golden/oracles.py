"""The formats a second time, weight by weight in plain Python: slow, and independent of qtool."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Parts = Mapping[str, NDArray[np.generic]]
Oracle = Callable[[Parts, int, int, int, int | None, str], NDArray[np.float64]]


def bit(words: NDArray[np.generic], index: int) -> int:
    """Return bit `index` of a row of int32 words; bit 0 of word 0 has index 0."""
    return (int(words[index // 32]) >> (index % 32)) & 1


def place(o: int, i: int, group_size: int | None, group_dim: str) -> tuple[int, int]:
    """Return where the parameter of weight (o, i) is stored."""
    if group_dim == "in_features":
        return o, i // group_size if group_size else 0
    return o // group_size if group_size else 0, i


def affine(
    parts: Parts, num_bits: int, out: int, in_: int, group_size: int | None, group_dim: str
) -> NDArray[np.float64]:
    weight = np.zeros((out, in_))
    for o in range(out):
        for i in range(in_):
            where = place(o, i, group_size, group_dim)
            row, group = where if group_dim == "in_features" else (where[1], where[0])
            code = zero = 0
            for plane in range(num_bits):
                code = 2 * code + bit(parts["codes"][plane, o], i)
                if "zero_points" in parts:
                    zero = 2 * zero + bit(parts["zero_points"][plane, group], row)
            if "zero_points" not in parts:
                zero = 2 ** (num_bits - 1)
            weight[o, i] = float(parts["scales"][where]) * (code - zero)
    return weight


def binary_coding(
    parts: Parts, num_bits: int, out: int, in_: int, group_size: int | None, group_dim: str
) -> NDArray[np.float64]:
    weight = np.zeros((out, in_))
    for o in range(out):
        for i in range(in_):
            where = place(o, i, group_size, group_dim)
            if "plane_offsets" in parts:
                weight[o, i] = float(parts["plane_offsets"][where])
            for plane in range(num_bits):
                sign = 1 if bit(parts["bit_planes"][plane, o], i) else -1
                weight[o, i] += sign * float(parts["plane_scales"][plane][where])
    return weight


def coded_scales(
    parts: Parts, num_bits: int, out: int, in_: int, group_size: int | None, group_dim: str
) -> NDArray[np.float64]:
    finest = max(5, num_bits + 2)
    widths = [finest, *(finest - plane + 1 for plane in range(1, num_bits))]
    symmetric = len(parts["scale_codes"]) == sum(widths)
    weight = np.zeros((out, in_))
    for o in range(out):
        for i in range(in_):
            where = place(o, i, group_size, group_dim)
            row, group = where if group_dim == "in_features" else (where[1], where[0])
            first, parameters = 0, []
            for width in widths if symmetric else [*widths, finest + 1]:
                code = 0
                for plane in parts["scale_codes"][first : first + width]:
                    code = 2 * code + bit(plane[group], row)
                first += width
                parameters.append(code)
            if not symmetric:
                parameters[-1] -= 2**finest
            unit = float(parts["row_scales"][row]) / 2**finest
            values = [float(np.float16(code * unit)) for code in parameters]
            for plane in range(num_bits):
                sign = 1 if bit(parts["bit_planes"][plane, o], i) else -1
                weight[o, i] += sign * values[plane]
            weight[o, i] += 0 if symmetric else values[-1]
    return weight


def mixed_rows(
    parts: Parts, num_bits: int, out: int, in_: int, group_size: int | None, group_dim: str
) -> NDArray[np.float64]:
    widths = sorted(int(name.rpartition("_w")[2]) for name in parts if "row_scales" in name)
    assert widths[-1] == num_bits
    weight = np.zeros((out, in_))
    classes: list[list[int]] = [[] for _ in widths]
    for o in range(out):
        number = 0
        for plane in parts.get("row_classes", []):
            number = 2 * number + bit(plane, o)
        classes[number].append(o)
    for width, rows in zip(reversed(widths), classes, strict=True):
        end = f"_w{width}"
        own = {name.removesuffix(end): part for name, part in parts.items() if name.endswith(end)}
        weight[rows] = coded_scales(own, width, len(rows), in_, group_size, group_dim)
    return weight


def dint(
    parts: Parts, num_bits: int, out: int, in_: int, group_size: int | None, group_dim: str
) -> NDArray[np.float64]:
    weight = np.zeros((out, in_))
    for o in range(out):
        for i in range(in_):
            where = place(o, i, group_size, group_dim)
            row, group = where if group_dim == "in_features" else (where[1], where[0])
            code = zero = 0
            for plane in range(num_bits):
                code = 2 * code + bit(parts["codes"][plane, o], i)
                if "zero_points" in parts:
                    zero = 2 * zero + bit(parts["zero_points"][plane, group], row)
            if "zero_points" not in parts:
                zero = 2 ** (num_bits - 1) - 2
            special = {2**num_bits - 2: 0.5, 2**num_bits - 1: -0.5}
            weight[o, i] = float(parts["scales"][where]) * special.get(code, code - zero)
    return weight


def minima(
    parts: Parts, num_bits: int, out: int, in_: int, group_size: int | None, group_dim: str
) -> NDArray[np.float64]:
    weight = np.zeros((out, in_))
    for o in range(out):
        for i in range(in_):
            where = place(o, i, group_size, group_dim)
            scale = float(parts["scales"][where])
            code = 0
            for plane in range(num_bits):
                code = 2 * code + bit(parts["codes"][plane, o], i)
            lowest = float(parts["minima"][where]) if "minima" in parts else None
            weight[o, i] = scale * code + (
                -scale * 2 ** (num_bits - 1) if lowest is None else lowest
            )
    return weight


def nested(
    parts: Parts, num_bits: int, out: int, in_: int, group_size: int | None, group_dim: str
) -> NDArray[np.float64]:
    width = 4 if num_bits <= 2 else 6 if num_bits <= 5 else 8
    size = group_size or max(out, in_)
    shared = size * max(1, 256 // size) if group_size else None
    symmetric = "super_minima" not in parts
    weight = np.zeros((out, in_))
    for o in range(out):
        for i in range(in_):
            where = place(o, i, group_size, group_dim)
            row, group = where if group_dim == "in_features" else (where[1], where[0])
            above = place(o, i, shared, group_dim)
            code = scale = lowest = 0
            for plane in range(num_bits):
                code = 2 * code + bit(parts["codes"][plane, o], i)
            for plane in range(width):
                scale = 2 * scale + bit(parts["scale_codes"][plane, group], row)
                if not symmetric:
                    lowest = 2 * lowest + bit(parts["minimum_codes"][plane, group], row)
            unit = float(parts["super_scales"][above])
            if symmetric:
                step = unit * (scale - 2 ** (width - 1))
                weight[o, i] = step * (code - 2 ** (num_bits - 1)) + 0.0  # never minus zero
            else:
                weight[o, i] = unit * scale * code - float(parts["super_minima"][above]) * lowest
    return weight


def ordered_affine(
    parts: Parts, num_bits: int, out: int, in_: int, group_size: int | None, group_dim: str
) -> NDArray[np.float64]:
    by_column = affine(parts, num_bits, out, in_, group_size, group_dim)
    weight = np.zeros((out, in_))
    for column in range(in_):
        weight[:, int(parts["input_order"][column])] = by_column[:, column]
    return weight


def encrypted_planes(
    parts: Parts, num_bits: int, out: int, in_: int, group_size: int | None, group_dim: str
) -> NDArray[np.float64]:
    num_outputs, num_inputs = parts["xor_networks"].shape[1], parts["encrypted_planes"].shape[2]
    planes = np.zeros((num_bits, out, -(-in_ // 32)), np.int64)
    for plane in range(num_bits):
        for o in range(out):
            taps, stored = parts["xor_networks"][plane, o % num_outputs], o // num_outputs
            for i in range(in_):
                made = 0
                for at in range(num_inputs):
                    made ^= bit(taps, at) & bit(parts["encrypted_planes"][plane, stored, at], i)
                planes[plane, o, i // 32] |= made << (i % 32)
    plain = {**parts, "bit_planes": planes}
    return binary_coding(plain, num_bits, out, in_, group_size, group_dim)


def sequential(words: NDArray[np.generic], network: NDArray[np.generic]) -> list[list[list[int]]]:
    """Return what decoders give, one after the other, by the clock: registers, then XOR gates."""
    registers = [[0] * len(words) for _ in network]  # of now, of a step ago, ...
    lanes = []
    for lane in range(32):
        given = []
        for column in words.T:
            registers = [[bit(column[at:], lane) for at in range(len(column))], *registers[:-1]]
            outputs = [0] * network.shape[1]
            for word, taps in zip(registers, network, strict=True):
                for output, row in enumerate(taps):
                    outputs[output] ^= sum(b & bit(row, at) for at, b in enumerate(word)) % 2
            given.append(outputs)
        lanes.append(given)
    return lanes


def sparse_planes(
    parts: Parts, num_bits: int, out: int, in_: int, group_size: int | None, group_dim: str
) -> NDArray[np.float64]:
    network, numel = parts["xor_network"], out * in_
    num_outputs, num_words = network.shape[1], -(-numel // 32)
    lanes = sequential(parts["code_words"], network)
    kept = [at for at in range(numel) if bit(parts["kept_weights"][0], at)]
    flipped = _places(parts, num_bits * len(kept))
    weight = np.zeros((out, in_))
    for plane in range(num_bits):
        for number, at in enumerate(kept):
            step, output = divmod(plane * num_words + at // 32, num_outputs)
            sign = lanes[at % 32][step][output]
            sign ^= flipped.count(plane * len(kept) + number) % 2
            where = place(at // in_, at % in_, group_size, group_dim)
            scale = 2 * float(parts["plane_scales"][plane][where])
            weight[at // in_, at % in_] += scale if sign else -scale
    return weight


def _places(parts: Parts, limit: int) -> list[int]:
    """Return the numbers of the bits that are corrected."""
    if "correction_places" not in parts:
        return []
    unary = parts["correction_places"][0]
    lows: list[NDArray[np.generic]] = list(parts.get("correction_lows", ()))
    found: list[int] = []
    rest = at = 0
    while at < 32 * len(unary):
        if bit(unary, at):
            low = sum(bit(row, len(found)) << (len(lows) - 1 - n) for n, row in enumerate(lows))
            found.append((rest << len(lows)) + low)
        else:
            rest += 1
        at += 1
    return [each for each in found if each < limit]


ORACLES: dict[str, Oracle] = {
    "affine": affine,
    "binary_coding": binary_coding,
    "coded_scales": coded_scales,
    "dint": dint,
    "encrypted_planes": encrypted_planes,
    "minima": minima,
    "mixed_rows": mixed_rows,
    "nested": nested,
    "ordered_affine": ordered_affine,
    "sparse_planes": sparse_planes,
}
