"""The host's side of generation: requests, blocks, scheduling, text. Imports no torch."""
