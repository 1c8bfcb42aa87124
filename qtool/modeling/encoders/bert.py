"""BERT, MiniLM and others of `BertForSequenceClassification`; norms come after the sums."""

from qtool.base import ModelAdapter

ADAPTER = ModelAdapter(
    blocks="bert.encoder.layer",
    linears=(
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        ("attention.output.dense",),
        ("intermediate.dense",),
        ("output.dense",),
    ),
    residual=("attention.output.dense", "output.dense"),
    embedding="bert.embeddings.word_embeddings",
    head="classifier",
    base_prefix="bert",
)
