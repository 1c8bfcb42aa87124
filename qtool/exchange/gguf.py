"""GGUF, the format of llama.cpp: one file with weights, configuration and tokenizer."""

from pathlib import Path

from qtool.checkpoint.manifest import LayerEntry
from qtool.exchange import Exchange, ForeignModel, LayerPlace
from qtool.exchange._gguf_about import read_about, read_tokenizer
from qtool.exchange._gguf_encode import why_no_type
from qtool.exchange._gguf_file import open_gguf
from qtool.exchange._gguf_plan import why_no_file
from qtool.exchange._gguf_read import names_of, readers
from qtool.exchange._gguf_write import compare_gguf, write_gguf


def _read(path: Path) -> ForeignModel:
    """Open a file: its header is checked, tensors are read when they are asked for."""
    file = open_gguf(path)
    layers, others, tied = readers(file, names_of(file))
    return ForeignModel(
        config=read_about(file),
        layers=layers,
        others=others,
        tied=tied,
        files=read_tokenizer(path),
    )


def _refuses(entry: LayerEntry, _place: LayerPlace) -> str | None:
    return why_no_type(entry)


EXCHANGE = Exchange(
    summary="One file of llama.cpp: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q2_K to Q6_K.",
    suffix=".gguf",
    read=_read,
    refuses=_refuses,
    refuses_model=why_no_file,
    write=write_gguf,
    compare=compare_gguf,
)
