"""Questions asked of ``llmq.memory``: does it fit, how many at once, how long. Imports no torch."""
