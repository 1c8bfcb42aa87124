"""What vLLM calls: a plug-in that loads qtool's checkpoints. Only some modules here import vLLM."""
