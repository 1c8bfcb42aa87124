"""The one door to lm-eval: its tasks, asked offline of a model that is loaded, answers kept."""
