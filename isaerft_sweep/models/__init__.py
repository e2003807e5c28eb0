"""Frozen language models and their tokenizers, from wherever they come."""
