"""The page of `qtool report`: one file per section, each a function from evidence to a section."""
