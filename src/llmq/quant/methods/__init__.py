"""One algorithm a file. Each is made of one or two of these steps, which are called alike in all files:

``fold(block, config, states, schemes) → changed``         scale a block's channels, so that rounding costs less
``quantize_weight(weight, scheme, …) → QuantizedWeight``   round one layer
``quantize_block(block, schemes, states, …)``              round the layers of a block together
"""
