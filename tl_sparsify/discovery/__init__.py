"""Behaviours of a model on a text: found without being told, each with a circuit of its own."""
