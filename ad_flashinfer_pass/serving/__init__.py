"""An OpenAI-compatible endpoint over the engine: one process, one model."""
