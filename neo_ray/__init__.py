"""Hyperparameter sweeps for LLM-Neo: distilling a large language model into a small one through a LoRA branch."""
