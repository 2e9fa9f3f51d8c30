"""Sparse dictionaries (autoencoders, transcoders): read them, see which features fire, remove features by name."""

from tl_sparsify.dictionaries.activity import firing
from tl_sparsify.dictionaries.files import load, save
from tl_sparsify.dictionaries.removal import remove

__all__ = ["firing", "load", "remove", "save"]
