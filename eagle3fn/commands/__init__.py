"""What the commands do: each builds its configuration and calls one function.

They take the parsed options. Imports are inside, so that `eagle3fn --help` is quick.
"""
