"""docs/which-recipe.md: which recipe fits on which card, from shapes alone.

Plans are those of `qtool quantize --dry-run`, bytes on a card those of `qtool inspect`; the models
have shapes and no weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import qtool.formats
from qtool import plugins
from qtool.checkpoint.manifest import LayerEntry, codec
from qtool.checkpoint.shards import Shards, TensorSpec
from qtool.modeling.families import load_family
from qtool.modeling.skeleton import empty_model
from qtool.modeling.source import ModelSource
from qtool.recipe.load import load_recipe
from qtool.runtime.card_memory import ACTIVATIONS, CardMemory, cache_bytes, card_memory
from qtool.steps.plan import LayerPlan, Plan, load_method, make_plan, original_bytes
from qtool.steps.table_rows import parts_of

GIB = 2**30
CARDS = (8, 16, 24, 80)
"""GiB of memory."""
RESERVE = GIB
"""Bytes for the driver, CUDA graphs, activations and logits: chosen, not measured."""
CONTEXT = 2048
"""Tokens that must have room."""
MANY = 128_000
RECIPES = {
    "bcq-w4g64-coded": "end-to-end",
    "bcq-w4g96-coded": "end-to-end",
    "bcq-w3g64-coded": "both",
    "bcq-w2g32-coded": "both",
    "bcq-w2g64-coded": "both",
}
"""By name, the `--tune` that they were measured with; the closest to the original first."""


@dataclass(frozen=True)
class Shape:
    """A model of Llama's architecture."""

    title: str
    like: str
    options: Mapping[str, Any]
    """Of `LlamaConfig`."""


SHAPES = (
    Shape(
        "1B",
        "Llama-3.2-1B",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
        },
    ),
    Shape(
        "8B",
        "Llama-3.1-8B",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    ),
    Shape(
        "13B",
        "Llama-2-13B",
        {
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 40,
            "vocab_size": 32000,
        },
    ),
    Shape(
        "70B",
        "Llama-3.1-70B",
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    ),
)


@dataclass(frozen=True)
class Size:
    """What a model takes under a recipe."""

    average_bits: float
    """Of the linears of the blocks, with scales and offsets, on disk."""
    disk_bytes: int
    card: CardMemory

    def tokens(self, card_bytes: int) -> int:
        """Return how many tokens have room beside the weights; negative: not even these fit."""
        left = card_bytes - RESERVE - self.card.weight_bytes
        assert self.card.cache_bytes_per_token is not None  # a Llama
        return left // self.card.cache_bytes_per_token


@cache
def open_shape(title: str) -> tuple[ModelSource, Any]:
    """Return a source that has names and shapes but no values, and its configuration."""
    from transformers import LlamaConfig

    (shape,) = (each for each in SHAPES if each.title == title)
    config, nowhere = LlamaConfig(**shape.options), Path(shape.like)
    values = empty_model(config, nowhere).state_dict()
    if config.tie_word_embeddings:
        del values["lm_head.weight"]
    specs = {
        name: TensorSpec(nowhere, "BF16", tuple(value.shape)) for name, value in values.items()
    }
    source = ModelSource(
        directory=nowhere,
        public_name=shape.like,
        config=config.to_dict(),
        parsed=config,
        adapter=load_family("llama"),
        shards=Shards(specs),
        prefix="",
        aliases={name: name for name in specs},
        num_blocks=config.num_hidden_layers,
        num_positions=None,
        residual=None,
        head_is_tied=config.tie_word_embeddings,
        experts={},
        full_names={},
        joined={},
        plain={},
    )
    return source, config


def original(title: str) -> Size:
    """Return what a model takes in 16 bits."""
    source, config = open_shape(title)
    stored = sum(original_bytes(source, name) for name in source.names())
    return Size(16.0, stored, CardMemory(stored, cache_bytes(config, ACTIVATIONS)))


@cache
def planned(title: str, recipe: str) -> Size:
    """Return what a model takes under a recipe."""
    source, config = open_shape(title)
    plan = make_plan(source, load_recipe(recipe))
    return Size(plan.average_bits, plan.total_bytes, card_memory(headers(source, plan), config))


def headers(source: ModelSource, plan: Plan) -> Any:  # noqa: ANN401
    """Return what `card_memory` asks of the checkpoint that a plan leads to."""
    layers = {layer.name: entry_of(layer) for layer in plan.layers}
    return SimpleNamespace(
        manifest=SimpleNamespace(layers=layers),
        names=lambda: (*layers, *plan.kept),
        spec=source.spec,
    )


def entry_of(layer: LayerPlan) -> LayerEntry:
    """Return how a planned layer will be stored."""
    layout = parts_of(load_method(layer.method), layer.scheme, layer.shape, layer.options)
    name = next(
        each
        for each in plugins.names(qtool.formats)
        if codec(each).layout(layer.scheme, layer.shape) == layout
    )
    return LayerEntry(format=name, scheme=layer.scheme, shape=layer.shape, method=layer.method)


def fitting(title: str, card: int) -> str:
    """Return what the table says of one model on one card."""
    for recipe in RECIPES:
        tokens = planned(title, recipe).tokens(card * GIB)
        if tokens >= CONTEXT:
            plain = original(title).tokens(card * GIB) >= CONTEXT
            return f"`{recipe}`{' *' if plain else ''}, {shown_tokens(tokens)}"
    return "none"


def shown_tokens(tokens: int) -> str:
    """Return a number of tokens in words, rounded down."""
    return f"{tokens // 1000},000 tokens" if tokens < MANY else f"over {MANY // 1000},000 tokens"


def page(note: str) -> str:
    """Return docs/which-recipe.md."""
    lines = [TOP.format(note=note)]
    lines += ["| model | " + " | ".join(f"{card} GB" for card in CARDS) + " |", "|---" * 5 + "|"]
    for shape in SHAPES:
        cells = [f"{shape.title} ({shape.like})", *(fitting(shape.title, card) for card in CARDS)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", MIDDLE, ""]
    titles = [shape.title for shape in SHAPES]
    lines += [
        "| recipe | bits per weight | " + " | ".join(titles) + " |",
        "|---|---:" + "|---:" * len(titles) + "|",
        "| none | 16 | " + " | ".join(sizes(original(title)) for title in titles) + " |",
    ]
    for recipe in RECIPES:
        found = [planned(title, recipe) for title in titles]
        cells = [f"`{recipe}`", f"{found[1].average_bits:.2f}", *map(sizes, found)]
        lines.append("| " + " | ".join(cells) + " |")
    tokens = [f"{original(title).card.cache_bytes_per_token / 1000:.0f} KB" for title in titles]
    lines += ["| a token of context | | " + " | ".join(tokens) + " |", "", BOTTOM]
    return "\n".join(lines)


def sizes(size: Size) -> str:
    """Return what is on disk and on the card, in units of 10^9 bytes."""
    return f"{size.disk_bytes / 1e9:.1f} / {size.card.weight_bytes / 1e9:.1f}"


TOP = """# Which recipe for which card

{note}
Find your model and the memory of your card. The cell names the built-in recipe that is
closest to the original among those that fit, and how many tokens of context have room beside it
(all requests together).
"""
MIDDLE = """\
*none*: not even the smallest recipe fits with 2,048 tokens. `*`: the original
fits in 16 bits as well; quantize for speed, or for more context. What 3 and
2 bits lose is in [results.md](results.md#quality): look before you take them.

Then, with your model in place of MODEL, and the recipe of the cell:

```
qtool quantize --recipe bcq-w4g64-coded MODEL OUT_DIR --dry-run
qtool quantize --recipe bcq-w4g64-coded MODEL OUT_DIR
```

`--tune end-to-end` (4 bits) or `--tune both` (3 and 2 bits) brings the result closer to the
original, and is what these numbers are of. End to end holds the original and
the result on one card, so for a model that only fits quantized take `--tune blocks`
([tuning.md](tuning.md)).

## What it is computed from

GB (10^9 bytes) on disk / of weights on a card; bits per weight of the linears of the blocks,
scales and offsets included, for 8B."""
BOTTOM = """\
- Sizes are those of `qtool quantize --dry-run` and `qtool inspect`, for models of these
  shapes: layouts are those of the kernels, as chosen for an H100. Embedding, head and norms stay
  in 16 bits. A card of 8 GB has 8 x 2^30 bytes here.
- 1 GiB is left for the driver, CUDA graphs, activations and logits. That number is chosen, not
  measured.
- Coded scales take the room of float16 scales on a card. That is why a recipe takes more there
  than on disk.
- The order of the recipes is that of their KL divergence on one model of 135M parameters; larger
  ones aren't measured yet. Measure yours: `qtool eval OUT_DIR --baseline MODEL`.
- A card below compute capability 8.0 has no kernels: weights are then as large as in 16 bits
  ([limitations.md](limitations.md#execution)).

## What quantizing takes

Blocks are solved one by one, so a card needs room for a block, not for the model. Three blocks of
the shape of 8B, with 128 x 2048 tokens, took 12.8 GB on an H100 ([log.md](log.md)). A CPU works
too: a 135M-parameter model takes half an hour on two cores. Where quantizing a table of
embeddings or a head pays, [recipes.md](recipes.md#embedding-and-head) says how; where layers get
bits of their own, [mixed-precision.md](mixed-precision.md).
"""
