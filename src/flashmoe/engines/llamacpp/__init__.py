"""Stock llama.cpp, driven through ctypes: dense weights in RAM, experts in the slot pool."""
