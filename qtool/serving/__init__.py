"""Many conversations over one model: batching, text, and the HTTP that chat clients know."""
