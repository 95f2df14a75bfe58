"""The front before llama.cpp's server: reverse proxy, limits, metrics, live telemetry and the dashboard."""
