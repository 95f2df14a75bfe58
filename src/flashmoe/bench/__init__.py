"""Paired benchmarks against stock llama.cpp under the same memory limit, and models of random weights to run them on.

`runner.run` does what `flashmoe bench` does; every measurement is a process of its own (`child`).
"""
