"""A program of its own: times a GGUF file by llama-cpp-python, under any Python that has it.

Arguments: file, threads (comma-separated), tokens of the prompt, of the context, to decode, and
repeats. Prints one line, a literal of Python: per number of threads the seconds of each repeat, and
the bytes of the weights.
"""

import ctypes
import sys
import time
from typing import Any

_FIRST, _STEP = 500, 7919
"""Token ids: any will do, spread over the vocabulary."""


class _Timed:
    """A model of llama.cpp, and one context."""

    def __init__(self, library: Any, path: str, room: int, threads: int) -> None:  # noqa: ANN401
        self.library = library
        options = library.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = library.llama_model_load_from_file(path.encode(), options)
        if not self.model:
            raise SystemExit(f"llama.cpp can't load {path}")
        context = library.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = 2 * room, room, room
        context.n_threads = context.n_threads_batch = threads
        self.context = library.llama_init_from_model(self.model, context)
        vocabulary = library.llama_model_get_vocab(self.model)
        self.vocabulary = int(library.llama_vocab_n_tokens(vocabulary))

    def seconds(self, count: int) -> float:
        """Read `count` tokens at once."""
        ids = [(_FIRST + index * _STEP) % self.vocabulary for index in range(count)]
        tokens = (self.library.llama_token * count)(*ids)  # named: the batch only points to it
        batch = self.library.llama_batch_get_one(tokens, count)
        begin = time.perf_counter()
        if self.library.llama_decode(self.context, batch) != 0:
            raise SystemExit("llama.cpp can't decode")
        self.library.llama_synchronize(self.context)
        return time.perf_counter() - begin

    def repeat(self, prompt: int, context: int, decode: int) -> tuple[float, float]:
        """Return the seconds of a prompt, and those of tokens after a short one."""
        self._clear()
        read = self.seconds(prompt)
        self._clear()
        self.seconds(context)
        return read, sum(self.seconds(1) for _ in range(decode))

    def _clear(self) -> None:
        memory = self.library.llama_get_memory(self.context)
        self.library.llama_memory_clear(memory, True)  # noqa: FBT003


def _main(path: str, threads: str, *numbers: str) -> None:
    """Time one file."""
    import llama_cpp as library

    quiet = library.llama_log_callback(lambda *_arguments: None)
    library.llama_log_set(quiet, ctypes.c_void_p(0))
    library.llama_backend_init()
    prompt, context, decode, repeats = map(int, numbers)
    result: dict[str, Any] = {"version": library.__version__, "prefill": {}, "decode": {}}
    for count in map(int, threads.split(",")):
        timed = _Timed(library, path, prompt + decode, count)
        pairs = [timed.repeat(prompt, context, decode) for _ in range(repeats + 1)][1:]
        result["prefill"][count], result["decode"][count] = zip(*pairs, strict=True)
        result["weight_bytes"] = int(library.llama_model_size(timed.model))
        library.llama_free(timed.context)
        library.llama_model_free(timed.model)
    sys.stdout.write(f"{result!r}\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])
