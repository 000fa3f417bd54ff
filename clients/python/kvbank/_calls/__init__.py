"""What is asked and answered: messages out of arguments, models out of messages. Nothing here does I/O, but for files
on the same host."""
