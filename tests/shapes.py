"""Shapes of real models, as their configurations have them."""

from backprop.core.memory import ModelShape

QWEN25_7B = ModelShape(
    hidden_size=3584,
    intermediate_size=18944,
    num_layers=28,
    max_positions=32768,
    vocabulary=152064,
    query_size=3584,
    key_size=512,
)
