"""tipl: policy weights under PPO as a sequence, and a Transformer that continues it (arXiv 2503.04074)."""
