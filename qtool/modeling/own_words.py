"""What a model writes for qtool: as it is asked, not as its generation_config.json has it."""

import contextlib
from collections.abc import Iterator

from qtool.modeling.load import LoadedModel


@contextlib.contextmanager
def written_as_asked(loaded: LoadedModel) -> Iterator[None]:
    """Let `model.generate` do inside the block what its arguments say, and nothing more.

    Of generation_config.json only the tokens that end a text count: penalties, beams, a cut
    distribution, stop strings or a kind of cache would make greedy search something else, or fail.
    """
    import transformers  # slow

    told = loaded.model.generation_config
    plain = transformers.GenerationConfig(eos_token_id=[*loaded.stop_ids] or None)
    loaded.model.generation_config = plain
    try:
        yield
    finally:
        loaded.model.generation_config = told
