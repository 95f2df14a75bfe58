"""Files that nobody should trust, changed at random: every reader either succeeds or says in a line what is wrong.

A few hundred cases run with the tests; `python -m tests.fuzz --files 20000` runs as many as one likes.
"""
