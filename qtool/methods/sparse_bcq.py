"""Pruned binary coding: small weights become zero, the signs of the others are encoded.

Magnitude pruning (Han et al. 2015, arXiv 1506.02626), planes fitted to what is kept, and these in
sequential encryption (Park et al. 2021, arXiv 2105.01869): about as many bits are stored as signs
are kept, besides the mask. Which weights are kept is chosen in each layer by itself.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field

from qtool.base import LayerProblem, LayerSolution, Method, QuantizedTensor
from qtool.checkpoint.manifest import codec
from qtool.core import metrics
from qtool.core.compressions import highest, share_left
from qtool.core.sequential_code import MEMORY, serial_network
from qtool.formats import sparse_planes
from qtool.formats._encoded_starts import sparse_code, sparse_start
from qtool.recipe.values import Number, WholeNumber
from qtool.scheme import BitCode, Shape2D, WeightScheme

EXPECTED_WRONG = 0.02
"""Share of the kept signs that is corrected, for plans: with 2^14 states and random signs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseBcqOptions:
    """Options of `sparse_bcq`."""

    sparsity: Annotated[Number, Field(ge=0, le=0.99)] = 0.0
    """Share of each layer's weights, the smallest, that becomes zero."""
    memory: Annotated[WholeNumber, Field(ge=MEMORY[0], le=MEMORY[-1])] = 10
    """Bits that the decoder's registers hold; each more doubles the time of the search."""
    seed: Annotated[WholeNumber, Field(ge=0, le=2**31)] = 0
    """Draws the decoder's network."""

    @property
    def code(self) -> BitCode:
        """Return what the decoder takes and gives; where all signs are kept, it loses none."""
        return sparse_code(self.sparsity, self.memory)


def _num_kept(shape: Shape2D, options: SparseBcqOptions) -> int:
    numel = shape.out_features * shape.in_features
    return max(1, share_left(options.sparsity, numel))


def _planned(scheme: WeightScheme, shape: Shape2D, options: SparseBcqOptions) -> WeightScheme:
    """Return the scheme with what is kept, and about how many bits will be corrected."""
    kept, code = _num_kept(shape, options), options.code
    is_exact = code.num_inputs == code.num_outputs  # any bits have an input
    corrections = 0 if is_exact else round(EXPECTED_WRONG * scheme.num_bits * kept)
    return replace(scheme, code=code.with_found(kept, corrections))


def quantize_sparse(problem: LayerProblem, options: SparseBcqOptions) -> LayerSolution:
    """Prune and quantize one weight, and search for its encoded signs; ignores all statistics."""
    code, shape = options.code, Shape2D(*problem.weight.shape)
    weight = problem.weight.cpu()
    generator = torch.Generator().manual_seed(options.seed)
    network = serial_network(code.num_outputs, code.num_inputs, code.registers, generator)
    kept = highest(weight.abs(), _num_kept(shape, options))
    found = sparse_start(weight, kept, network, replace(problem.scheme, code=code))
    parts = {name: part.to(problem.weight.device) for name, part in found.parts.items()}
    tensor = QuantizedTensor(found.format, found.scheme, shape, parts)
    quantized = codec(found.format).dequantize(tensor, torch.float32)
    assert found.scheme.code is not None
    signs = found.scheme.num_bits * found.scheme.code.kept
    measured = {
        "nmse": metrics.nmse(problem.weight, quantized),
        "corrected": found.scheme.code.corrections / signs,
    }
    return LayerSolution(tensor, measured)


METHOD = Method(
    summary="Pruned binary coding whose signs a sequential decoder makes.",
    options=SparseBcqOptions,
    solve=quantize_sparse,
    layout=lambda scheme, shape, options: sparse_planes.CODEC.layout(
        _planned(scheme, shape, options), shape
    ),
    num_bits=range(1, sparse_planes.MOST_PLANES + 1),
    writes=lambda _options: sparse_planes.SPARSE_PLANES,
    is_tunable=False,
)
