"""llama.cpp's own server, in this process, over a model and a context of ours.

The server loads its model by a path and makes its context itself. Calls between parts of its library go through import
slots (`imports.py`); two of them, pointed at compiled functions (`borrow.py`), hand it what has been made here. A third
one tells where the evaluation of a graph ends, and fails it where a read has failed.
"""
