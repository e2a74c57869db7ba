"""On-disk formats of quantized weights: one file each, whose description both reader and writer follow."""
