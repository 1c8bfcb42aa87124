import torch

from qtool.modeling.load import load_model
from qtool.modeling.locate import Location
from qtool.timing.model import time_model


def test_timing_leaves_the_model_as_it_was(checkpoint):
    loaded = load_model(Location(checkpoint))
    tokens = torch.arange(3, 20).unsqueeze(0)
    with torch.inference_mode():
        before = loaded.model(tokens).logits
        result = time_model(loaded, prompt_tokens=5, decode_tokens=2, repeats=1)
        assert torch.equal(before, loaded.model(tokens).logits)
    assert (result.prompt_tokens, result.decode_tokens, result.repeats) == (5, 2, 1)


def test_backends_that_ran_are_named_and_none_for_an_unquantized_model(llama, checkpoint):
    from qtool.runtime.backends._choose import use_backend

    short = {"prompt_tokens": 4, "decode_tokens": 1, "repeats": 1}
    assert time_model(load_model(Location(llama)), **short).backends == ()
    for name in ("dense", "reference"):
        with use_backend(name):
            assert time_model(load_model(Location(checkpoint)), **short).backends == (name,)
