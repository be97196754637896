"""Stock transformers models, made resumable, and their weights."""
