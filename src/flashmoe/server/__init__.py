"""The OpenAI-compatible server: `scheduler` runs requests in turns, `app` is HTTP, `serve` a process of both."""
