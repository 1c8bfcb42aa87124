"""kernels/lut_gemm.cu, launched on the CPU as the backend decides, against float64."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from qtool.runtime.backends.cuda import lut
from qtool.runtime.backends.cuda.launch import Card, KernelCall
from qtool.scheme import Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.helpers import dequantized, normal
from tests.kernels.host import Recorder

SMALL = Card(multiprocessors=3, shared_bytes=99 * 1024)
WIDE = Card(multiprocessors=132, shared_bytes=227 * 1024)
BEFORE_CAST = 1e-6
AFTER_CAST = {torch.float16: 5e-4, torch.bfloat16: 4e-3}


@dataclass(frozen=True)
class Case:
    num_bits: int
    shape: tuple[int, int]
    group_size: int | None
    card: Card = WIDE
    batch: int = 1
    symmetric: bool = False
    dtype: torch.dtype = torch.float16

    def weight(self):
        scheme = WeightScheme(
            num_bits=self.num_bits, group_size=self.group_size, symmetric=self.symmetric
        )
        return random_tensor("binary_coding", scheme, Shape2D(*self.shape), self.num_bits)

    def inputs(self):
        x = normal(self.batch, self.shape[1], seed=self.batch)
        x[:, ::37] *= 300
        return x.to(self.dtype).contiguous()


class Poisoner(Recorder):
    """A recorder that makes what isn't a weight or an input NaN before a kernel writes it."""

    def __call__(self, call: KernelCall, tensors: Sequence[Tensor | None]) -> None:
        outputs = [tensor for tensor in tensors if tensor is not None][-1]
        outputs.fill_(torch.nan)
        super().__call__(call, tensors)


def relative_error(got, x, tensor) -> float:
    expected = x.double() @ dequantized(tensor, torch.float64).T
    return float((got.double() - expected).norm() / expected.norm())


CASES = [
    Case(3, (40, 1100), 64),
    Case(2, (137, 1024), 128, batch=3),
    Case(4, (33, 2304), 256, batch=2),
    Case(1, (21, 300), 32, symmetric=True),
    Case(2, (3, 40), None),
    Case(1, (1, 1030), 96, batch=3),
    Case(3, (20, 1601), None, dtype=torch.bfloat16),
    Case(8, (9, 1250), 192, symmetric=True),
    Case(5, (7, 520), 96, dtype=torch.bfloat16),
    Case(3, (70, 1100), 64, card=SMALL, batch=3),
    Case(4, (35, 513), 192, card=SMALL, dtype=torch.bfloat16),
    Case(2, (150, 700), None, card=SMALL, symmetric=True),
    Case(7, (5, 2100), 32, card=SMALL),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_agree_before_and_after_the_cast(case):
    tensor, x, launch = case.weight(), case.inputs(), Poisoner()
    got = lut.multiply_by_tables(x, tensor, launch, case.card)
    assert got.shape == (case.batch, case.shape[0])
    assert got.dtype == case.dtype
    assert relative_error(got, x, tensor) < AFTER_CAST[case.dtype]
    call = launch.calls[0]
    blocks, slabs, _ = call.grid
    assert blocks == 1 or blocks * slabs <= case.card.multiprocessors
    assert call.shared_bytes <= case.card.shared_bytes
    assert launch.names == (["lut_gemm", "add_splits"] if slabs > 1 else ["lut_gemm"])
    if slabs > 1:
        partial = launch.tensors[0][-1]
        assert partial is not None
        assert relative_error(partial.sum(0), x, tensor) < BEFORE_CAST


def test_warps_go_through_many_rows():
    case = Case(2, (1037, 600), 64, card=SMALL._replace(multiprocessors=2))
    tensor, x, launch = case.weight(), case.inputs(), Poisoner()
    got = lut.multiply_by_tables(x, tensor, launch, case.card)
    assert relative_error(got, x, tensor) < AFTER_CAST[case.dtype]
    assert launch.calls[0].grid == (1, 2, 1)  # 64 rows at a time: more than 16 times


@pytest.mark.parametrize(
    "tuned",
    [lut.TableTuning(4, 8, 512), lut.TableTuning(4, 1, 256), lut.TableTuning(2, 32, 128)],
    ids=str,
)
def test_tuning_changes_nothing_but_time(tuned, monkeypatch):
    monkeypatch.setattr(lut, "table_tuning", lambda *_: tuned)
    case = Case(3, (75, 1100), 96)
    tensor, x = case.weight(), case.inputs()
    got = lut.multiply_by_tables(x, tensor, Poisoner(), WIDE)
    assert relative_error(got, x, tensor) < AFTER_CAST[case.dtype]


def test_infinite_and_missing_numbers_reach_the_output():
    case = Case(2, (16, 256), 128, batch=3, card=SMALL)
    x = case.inputs()
    x[0, 5], x[1, 9], x[2] = torch.inf, torch.nan, 0
    y = lut.multiply_by_tables(x, case.weight(), Poisoner(), case.card)
    assert not bool(torch.isfinite(y[:2]).any())
    assert torch.equal(y[2], torch.zeros(16, dtype=torch.float16))


def test_no_tokens_launch_nothing():
    launch = Recorder()
    got = lut.multiply_by_tables(torch.empty(0, 300).half(), CASES[3].weight(), launch, WIDE)
    assert got.shape == (0, 21)
    assert launch.names == []


@pytest.mark.parametrize(
    ("format_name", "scheme", "reason"),
    [
        ("binary_coding", WeightScheme(num_bits=3, group_size=64), None),
        ("binary_coding", WeightScheme(num_bits=3, group_size=None), None),
        ("binary_coding", WeightScheme(num_bits=3, group_size=200), None),
        ("binary_coding", WeightScheme(num_bits=3, group_size=48), "not 48 inputs"),
        ("binary_coding", WeightScheme(num_bits=3, group_dim="out_features"), "out_features"),
        ("affine", WeightScheme(num_bits=3, group_size=64), "affine"),
    ],
)
def test_what_it_cannot_run_has_a_reason(format_name, scheme, reason):
    found = lut.why_no_tables(random_tensor(format_name, scheme, Shape2D(8, 192), 0))
    assert (found is None) if reason is None else (reason in (found or ""))
