"""The memory of a server process: what the C allocator keeps, and what Python's collector looks at.

glibc gives every freed megabyte back to the system, and taking it anew costs a page fault for each 4 KiB: measured on a
virtual machine, ten times what it takes to read and verify the bytes. And Python's collector goes through all that was
ever imported, again and again: measured, two thirds of what a search took.
"""

import ctypes
import gc

# Kept at most by each of the arenas, which all threads share.
_KEPT, _ARENAS = 32 * 1024 * 1024, 2
# What is larger is a mapping of its own, as before.
_LARGEST = 16 * 1024 * 1024
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def keep_memory() -> None:
    """For a process that is a server and nothing else; does nothing where the allocator is another one."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, _ARENAS)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)


def leave_imports_alone() -> None:
    """Once everything is loaded: what is there now stays, and is not looked at again."""
    gc.collect()
    gc.freeze()
