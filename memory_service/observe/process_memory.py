"""The memory of a server process: what the C allocator keeps, and what Python's collector looks at.

glibc gives every freed megabyte back to the system, and taking it anew costs a page fault for each 4 KiB: measured on a
virtual machine, ten times what it takes to read and verify the bytes. And Python's collector goes through all that was
ever imported, again and again: measured, two thirds of what a search took.
"""

import ctypes
import gc

# The bytes that each arena keeps at most, and the arenas, which all threads share.
_KEPT, _ARENAS = 32 * 1024 * 1024, 2
# An allocation of more bytes is a mapping of its own, as before.
_LARGEST = 16 * 1024 * 1024
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def keep_memory() -> None:
    """Have glibc keep freed memory for later use; this does nothing where the allocator is another one. It is for a
    process that is a server and nothing else."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, _ARENAS)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)


def begin_to_import() -> None:
    """Have Python's collector look at nothing until `leave_imports_alone`: what is imported stays, and to look for what
    does not took a seventh of a start. It is for a process that is a server and nothing else."""
    gc.disable()


def leave_imports_alone() -> None:
    """Have Python's collector look at what will be made, and never at what is there now. This is called once everything
    is loaded."""
    gc.freeze()
    gc.enable()
