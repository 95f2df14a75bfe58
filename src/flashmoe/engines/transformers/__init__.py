"""The Hugging Face Transformers engine: the library's own models, their experts in a slot pool."""
