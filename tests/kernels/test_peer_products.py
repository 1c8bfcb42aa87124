"""Products summed over ranks by the launches that make them: processes with shared memory."""

import pytest
import torch

from qtool.runtime.backends.cuda import grids, peer_products
from qtool.runtime.backends.cuda.kernel_weight import KernelWeight
from qtool.runtime.backends.cuda.launch import Card, KernelCall, Launch
from qtool.runtime.backends.cuda.linear_kernels import prepare
from qtool.runtime.backends.cuda.peer_products import Peers, peer_box_bytes, summed_product
from qtool.runtime.tensor_parallel import TensorParallel
from qtool.scheme import Shape2D, WeightScheme
from tests.contract.test_codecs import random_tensor
from tests.helpers import normal
from tests.kernels.host import Recorder, host_kernels
from tests.runtime_decode.ranks import on_ranks

INPUTS = 512
SCHEME = WeightScheme(num_bits=2, group_size=64)
CARD = Card(3, 99 * 1024)
SHARING = Card(3, 99 * 1024, "blocks share tiles")
# Rows, tokens, whether there is a residual: one block and several, a last tile that is not full.
CASES = ((40, 1, True), (200, 3, False), (40, 1, True), (64, 5, True))


def weight_of(rank: int, rows: int, dtype: torch.dtype) -> KernelWeight:
    tensor = random_tensor("binary_coding", SCHEME, Shape2D(rows, INPUTS), seed=rows + rank)
    return prepare(tensor, dtype)


def inputs(rank: int, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    return normal(tokens, INPUTS, seed=7 * tokens + rank).to(dtype)


def products(peers: Peers, launch: Launch, card: Card, dtype: torch.dtype) -> list[torch.Tensor]:
    found = []
    for rows, tokens, has_residual in CASES:
        residual = normal(tokens, rows, seed=rows).to(dtype) if has_residual else None
        x, weight = inputs(peers.rank, tokens, dtype), weight_of(peers.rank, rows, dtype)
        y = summed_product(x, weight, launch, card, peers, residual)
        assert y is not None
        found.append(y)
    return found


def peers_at(rank: int, addresses: list[int]) -> Peers:
    return Peers(rank, torch.tensor(addresses), torch.zeros(2, dtype=torch.int32))


def sums(
    group: TensorParallel, boxes: list[torch.Tensor], card: Card, dtype: torch.dtype
) -> list[torch.Tensor]:
    peers = peers_at(group.rank, [box.data_ptr() for box in boxes])
    found = [y for _ in range(2) for y in products(peers, Recorder(), card, dtype)]
    assert peers.rounds.tolist() == [2 * len(CASES), 0]
    return found


def compile_first(ranks: int, card: Card, dtype: torch.dtype) -> list[KernelCall]:
    """Compile what processes will need, once for all of them."""
    calls: list[KernelCall] = []
    products(peers_at(0, [0] * ranks), lambda call, _: calls.append(call), card, dtype)
    for call in calls:
        host_kernels(call.file, call.constants)
    return calls


@pytest.mark.parametrize(
    ("ranks", "card", "dtype"), [(2, CARD, torch.float16), (3, SHARING, torch.bfloat16)]
)
def test_a_launch_sums_over_ranks_and_rounds_once(ranks, card, dtype, monkeypatch):
    if card is SHARING:
        monkeypatch.setattr(grids, "MOST_IDLE", -1)
    calls = compile_first(ranks, card, dtype)
    assert {call.kernel for call in calls} == {"bit_plane_imma_ranks", "bit_plane_lookup_mma_ranks"}
    assert {dict(call.constants)["WHOLE"] for call in calls} == {int(card is CARD)}
    boxes = [torch.zeros(peer_box_bytes(ranks) // 8, dtype=torch.int64) for _ in range(ranks)]
    found = on_ranks(sums, [box.share_memory_() for box in boxes], card, dtype, count=ranks)
    for index, (rows, tokens, plus) in enumerate(CASES * 2):
        exact = torch.zeros(tokens, rows, dtype=torch.float64)
        for rank in range(ranks):
            weight = weight_of(rank, rows, dtype).dense().double()
            exact += inputs(rank, tokens, dtype).double() @ weight.T
        if plus:
            exact += normal(tokens, rows, seed=rows).to(dtype).double()
        for mine in found:  # half a place of what is stored, and the product's own error
            allowed = 0.5001 * torch.finfo(dtype).eps * exact.abs() + 1e-4
            assert ((mine[index].double() - exact).abs() <= allowed).all()
            assert torch.equal(mine[index], found[0][index])


def is_refused(weight: KernelWeight, tokens: int, card: Card = CARD) -> bool:
    x, calls = torch.zeros(tokens, INPUTS, dtype=torch.float16), []
    y = summed_product(x, weight, lambda *call: calls.append(call), card, peers_at(0, [0, 0]))
    assert len(calls) == (y is not None)
    return y is None


def test_what_is_not_one_launch_of_blocks_that_run_at_once_is_refused(monkeypatch):
    weight = weight_of(0, 640, torch.float16)
    assert not is_refused(weight, 1)
    assert is_refused(weight, 64)  # several blocks of tokens
    assert is_refused(weight, 1, Card(3, 8 * 1024))  # inputs are cut into slabs
    monkeypatch.setattr(peer_products, "MOST_NUMBERS", 639)
    assert is_refused(weight, 1)
