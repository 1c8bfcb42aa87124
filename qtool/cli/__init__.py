"""The terminal: the only place for typer and rich. Commands parse, call the pipeline, render."""
