"""Offline quantization: a model folder in, a smaller model folder out."""
