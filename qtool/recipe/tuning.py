"""The section `tuning` of a recipe: what is learned by gradients. Torch-free."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qtool.recipe.values import MOST_LENGTH, Number, Section, WholeNumber

TuningKind = Literal["none", "blocks", "end-to-end", "both"]


class BlockTuning(Section):
    """Gradients through one block at a time: scales, offsets and codes, for the block's outputs."""

    steps: Annotated[WholeNumber, Field(ge=1, le=1_000_000)] = 400
    learning_rate: Annotated[Number, Field(gt=0, le=1)] = 1e-3
    """What a first step moves scales and offsets by, in distances between two levels."""
    code_rate: Annotated[Number, Field(ge=0, le=1)] = 5e-3
    """What a first step moves latent codes by, in steps of codes; 0: codes stay."""


class EndToEndTuning(Section):
    """Gradients through the whole model: KL to the original's predictions."""

    steps: Annotated[WholeNumber, Field(ge=1, le=1_000_000)] = 1000
    batch_size: Annotated[WholeNumber, Field(ge=1, le=MOST_LENGTH)] = 8
    """Samples a step."""
    sequence_length: Annotated[WholeNumber, Field(ge=2, le=MOST_LENGTH)] = 1024
    learning_rate: Literal["auto"] | Annotated[Number, Field(gt=0, le=1)] = 1.5e-3
    """What a first step moves scales and offsets by, in distances between two levels; auto: that
    of three which is best after a few steps."""
    code_rate: Annotated[Number, Field(ge=0, le=1)] = 0.0
    """What a first step moves latent codes by, in steps of codes; 0: codes stay, to the bit."""
    code_share: Annotated[Number, Field(ge=0, le=0.01)] = 0.0
    """Share of a layer's codes that may move at each look at the held-out samples, those that
    promise most, if the loss on these falls; 0: codes stay."""
    self_written: Literal["auto"] | Annotated[Number, Field(ge=0, lt=1)] = "auto"
    """Share of the samples that the original writes itself, beside those of the mixture; auto: 0.3
    on a card, none on a CPU, where it takes hours."""
    recompute: Literal["auto"] | bool = "auto"
    """Run each block once more on the way back, in place of keeping what it computed: a third
    slower, and the memory of one block; auto: for a billion parameters and more."""
    norms: bool = True
    """Norms and biases learn too."""

    @model_validator(mode="after")
    def _check_codes(self) -> "EndToEndTuning":
        if self.code_rate > 0 and self.code_share > 0:
            raise ValueError("code_rate and code_share both move codes; set one of them to 0")
        return self


class TuningSection(Section):
    """What is learned by gradients after, or while, layers are solved."""

    blocks: BlockTuning | None = None
    end_to_end: EndToEndTuning | None = None

    @property
    def is_on(self) -> bool:
        """Whether anything is learned."""
        return self.blocks is not None or self.end_to_end is not None

    def only(self, kind: TuningKind) -> "TuningSection":
        """Return a section that does just this, with its own settings where it has some."""
        blocks = (self.blocks or BlockTuning()) if kind in ("blocks", "both") else None
        whole = (self.end_to_end or EndToEndTuning()) if kind in ("end-to-end", "both") else None
        return TuningSection(blocks=blocks, end_to_end=whole)
