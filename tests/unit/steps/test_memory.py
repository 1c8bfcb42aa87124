"""Memory of a run without data is bounded by the largest tensor, not by the model."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from qtool.steps.memory import peak_memory
from tests.helpers import normal, run_python

WIDTH, MIDDLE = 768, 1536
BLOCK_BYTES = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * MIDDLE)

RUN = """
import sys
from pathlib import Path
from qtool import pipeline
from qtool.modeling.locate import locate
from qtool.recipe.load import recipe_from_mapping
recipe = recipe_from_mapping({"weights": {"method": "rtn"}})
pipeline.quantize(locate(sys.argv[1]), Path(sys.argv[2]), recipe)
(peak,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(int(peak.split()[1]) * 1024)
"""


def write_model(directory: Path, num_blocks: int) -> str:
    """Write a llama of equal blocks, tensor by tensor, without building it."""
    square, tall = normal(WIDTH, WIDTH).half(), normal(MIDDLE, WIDTH).half()
    tensors = {"model.embed_tokens.weight": torch.zeros(8, WIDTH).half()}
    tensors["model.norm.weight"] = torch.ones(WIDTH).half()
    for block in range(num_blocks):
        prefix = f"model.layers.{block}"
        for name in "qkvo":
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = square.clone()
        for name in ("gate", "up"):
            tensors[f"{prefix}.mlp.{name}_proj.weight"] = tall.clone()
        tensors[f"{prefix}.mlp.down_proj.weight"] = tall.T.contiguous()
        for name in ("input", "post_attention"):
            tensors[f"{prefix}.{name}_layernorm.weight"] = torch.ones(WIDTH).half()
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": True,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "hidden_size": WIDTH,
        "intermediate_size": MIDDLE,
        "vocab_size": 8,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def test_peak_does_not_grow_with_the_number_of_blocks(tmp_path):
    few, many = 1, 24
    peaks = [
        int(run_python(RUN, write_model(tmp_path / str(n), n), str(tmp_path / f"out{n}")))
        for n in (few, many)
    ]
    more_weights = (many - few) * BLOCK_BYTES
    assert more_weights > 250e6
    assert peaks[1] - peaks[0] < 0.2 * more_weights


def test_peak_of_this_process_is_in_bytes():
    assert 50e6 < peak_memory("cpu") < 100e9
