"""Texts and what becomes of them: sources, token streams, samples of matched lengths."""
