"""Model families: one file per `model_type`, dotted names only, constant ADAPTER."""
