"""RLVR reward landscape: measure the neighbourhood of training checkpoints. Importing this costs nothing."""

__version__ = "0.1.0"
