"""What is asked and answered: messages out of arguments, models out of messages. Nothing here does I/O.

Both clients use this package, and so does `kvbank._transport`, which moves what is made here; this package imports
nothing of that.
"""
