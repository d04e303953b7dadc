"""A metric module of the `evaluate` library, to be loaded by the path of this folder."""
