"""Messages are made out of arguments here, and models out of messages. Nothing in this package does I/O.

Both clients use this package, and so does `kvbank._transport`, which moves what is made here; this package imports
nothing of that.
"""
