"""FleXOR's gradient against its formula, and its signs against the gates."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.core.packing import pack_bits, unpack_bits
from qtool.core.xor_gradients import xor_signs
from qtool.core.xor_networks import tapped_network, through_network


@given(
    inputs=st.integers(1, 7),
    more=st.integers(0, 9),
    sharpness=st.floats(0.5, 20),
    seed=st.integers(0, 1000),
)
def test_signs_are_those_of_the_gates_and_gradients_those_of_the_paper(
    inputs, more, sharpness, seed
):
    generator = torch.Generator().manual_seed(seed)
    network = tapped_network(inputs + more, inputs, min(2, inputs), generator)
    latent = torch.randn(3, inputs, 11, generator=generator).requires_grad_()
    made = xor_signs(latent, network.float(), sharpness)
    stored = pack_bits((latent.detach() >= 0).to(torch.uint8))
    gates = through_network(stored, network)
    assert torch.equal(made, unpack_bits(gates, 11).float() * 2 - 1)
    grad = torch.randn(made.shape, generator=generator)
    made.backward(grad)
    signs = torch.where(latent.detach() >= 0, 1.0, -1.0).double()
    expected = torch.zeros(latent.shape, dtype=torch.float64)
    for row, taps in enumerate(network.bool()):
        inside = taps.nonzero().flatten().tolist()
        for one in inside:
            others = [each for each in inside if each != one]
            product = signs[:, others].prod(1) * (-1) ** (len(inside) - 1)
            expected[:, one] += grad[:, row].double() * product
    slope = sharpness * (1 - torch.tanh(sharpness * latent.detach().double()).square())
    assert latent.grad is not None
    torch.testing.assert_close(latent.grad.double(), expected * slope, rtol=1e-4, atol=1e-5)


def test_signs_can_be_learned():
    """Latents follow gradients to signs that they did not begin with."""
    generator = torch.Generator().manual_seed(0)
    network = tapped_network(10, 8, 2, generator)
    stored = pack_bits((torch.randn(8, 200, generator=generator) >= 0).to(torch.uint8))
    wanted = unpack_bits(through_network(stored, network), 200)
    latent = (1e-3 * torch.randn(8, 200, generator=generator)).requires_grad_()
    adam = torch.optim.Adam([latent], lr=1e-3)
    shares = []
    for _ in range(300):
        signs = xor_signs(latent, network.float(), 10.0)
        shares.append(float((signs == wanted * 2.0 - 1).float().mean()))
        adam.zero_grad()
        (signs - wanted * 2.0 + 1).square().sum().backward()
        adam.step()
    assert shares[0] == pytest.approx(0.5, abs=0.05)
    assert shares[-1] > 0.85
