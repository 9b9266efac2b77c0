"""Training without an engine: what is learnt from, how, and what is measured; ``runtime/ray_train.py`` runs it."""
