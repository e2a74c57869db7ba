"""One algorithm a file, one signature for all: ``quantize_weight(weight, scheme, hessian) → QuantizedWeight``."""
