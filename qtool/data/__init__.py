"""Text and what becomes of it: bundled corpora, token streams."""
