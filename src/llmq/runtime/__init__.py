"""The device's side of generation: a StepPlan in, token ids out. Never imports ``llmq.engine``."""
