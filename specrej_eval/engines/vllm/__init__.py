"""vLLM's engine in this process, for models that one device does not hold."""
