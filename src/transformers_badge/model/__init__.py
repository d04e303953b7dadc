"""The code that ships inside every checkpoint: flat files, importing torch, transformers and each other only."""
