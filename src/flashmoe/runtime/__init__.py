"""From a model's files to an answer: `load`, the model, its server, reports."""
