"""The folders of the payloads of banks. This file owns that none is removed while something is put into it, that a bank
whose disk is missing is not taken for one without payloads, and that what a person has put there stays.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from pathlib import Path

from kvbank.files import private
from kvbank.files.durable import sync_folder
from memory_service.storage.base import NotThereError
from memory_service.storage.local.files.layout import (
    FOLDER,
    MARK,
    SUFFIX,
    banks_in,
    entries_of,
    files_in,
    is_shard,
    name,
)
from memory_service.storage.local.files.marks import displaced, marked, put_mark

# Bank uid -> ids with a payload; None for a bank that is being deleted.
Known = Mapping[str, Set[int] | None]


class BankFolders:
    """The folders of the payloads of a data folder, one a bank. Threads share this. Errors: OSError where the storage
    fails."""

    def __init__(self, data: Path, *, durable: bool) -> None:
        """Make the folder of all payloads where there is none."""
        self._data = data
        self._root = data / FOLDER
        self._durable = durable
        # Bank uid -> a bit for each of its folders that is known to be durable. One that merely exists may be another
        # thread's, and not synced yet.
        self._durable_folders: dict[str, int] = {}
        private.make_folder(self._root)
        # Bank uids: whose folder this process has made; which are deleted; into which so many files are being put.
        self._begun: set[str] = set()
        self._changes = threading.Condition()
        self._dropped: set[str] = set()
        self._busy: Counter[str] = Counter()
        self._sync(data)

    # Making

    def begin(self, bank_uid: str) -> None:
        """Make the folder of a new bank, durably. Errors: NotThereError where the disk of the payloads is missing."""
        if not self.mounted():
            raise NotThereError("the folder of all payloads has no mark")
        self._begun.add(bank_uid)
        self.mark(bank_uid)

    def mark(self, bank_uid: str) -> None:
        """Put the mark into the folder of a bank, which is made where it is missing."""
        folder = self._root / bank_uid
        private.make_folder(folder)
        put_mark(folder, durable=self._durable)
        self._sync(self._root)

    def mark_root(self) -> None:
        """Put the mark into the folder of all payloads."""
        put_mark(self._root, durable=self._durable)

    def make_shard(self, bank_uid: str, chunk_id: int) -> None:
        """Make the folder of a chunk's file below that of its bank, durably."""
        bit = 1 << (chunk_id & 0xFF)
        if self._durable_folders.get(bank_uid, 0) & bit:
            return
        folder = (self._data / name(bank_uid, chunk_id)).parent
        # The folder of the bank is not made: it has its mark, or is gone.
        folder.mkdir(private.FOLDER, exist_ok=True)
        self._sync(folder.parent)
        self._sync(self._root)
        # Two threads at once may lose one of their bits, which costs a sync and no more.
        self._durable_folders[bank_uid] = self._durable_folders.get(bank_uid, 0) | bit

    @property
    def root(self) -> str:
        """Return the path of the folder of all payloads."""
        return str(self._root)

    def of(self, bank_uid: str) -> str:
        """Return the path of the folder of a bank."""
        return f"{self._root}/{bank_uid}"

    # Marks

    def mounted(self) -> bool:
        """Tell whether the folder of all payloads is the one that was marked."""
        return marked(self._root)

    def present(self, bank_uid: str) -> bool:
        """Tell whether the bank's folder is the one that was marked."""
        return marked(self.of(bank_uid))  # no Path: this is asked for each file that is put

    # Removing

    @contextmanager
    def using(self, bank_uid: str) -> Iterator[None]:
        """Keep a bank's folder from being removed while the block puts something into it. Errors: NotThereError."""
        with self._changes:
            if bank_uid in self._dropped or not self.present(bank_uid):
                raise NotThereError(f"the folder {bank_uid} is deleted, or has no mark")
            self._busy[bank_uid] += 1
        try:
            yield
        finally:
            with self._changes:
                self._busy[bank_uid] -= 1
                if not self._busy[bank_uid]:
                    del self._busy[bank_uid]
                    self._changes.notify_all()

    def drop(self, bank_uid: str) -> bool:
        """Remove all files of a bank, and its folders where nothing else is in them, once nothing is being put into
        them.

        Returns whether none of its files is left. That is not known, and so False, where its disk is missing, or the
        folder of another bank is in its place.
        """
        with self._changes:
            self._dropped.add(bank_uid)
            self._changes.wait_for(lambda: bank_uid not in self._busy)
        self._durable_folders.pop(bank_uid, None)
        folder = self._root / bank_uid
        if displaced(folder) or not (self.mounted() or self.present(bank_uid)):
            return False
        for _, path in files_in(folder):
            with suppress(OSError):
                path.unlink()
        if any(True for _ in files_in(folder)):
            return False
        self._remove_folder(folder)
        return True

    @staticmethod
    def _remove_folder(folder: Path) -> None:
        """Remove a bank's folder that has no payloads; what a person has put there stays."""
        with suppress(OSError):
            (folder / MARK).unlink(missing_ok=True)
        for emptied in (*filter(is_shard, entries_of(folder)), folder):
            with suppress(OSError):
                emptied.rmdir()

    def unowned(self, known: Callable[[], Known], below: int) -> Iterator[tuple[str, int, Path]]:
        """Yield (bank uid, chunk id, file) of every payload that no row names and whose id is less than `below`.
        Temporary files, which were never whole payloads, are removed on the way. Where the folder of no known bank is
        there, the disk of another data folder may be mounted, and nothing is yielded.

        known: returns the ids that rows name; it is called after the folders were listed, so that the folder that a new
        bank makes meanwhile is not taken for a leftover.
        """
        folders = banks_in(self._data)
        rows = known()
        if rows and not any(map(self.present, rows)):
            return
        for folder in folders:
            ids = rows.get(folder.name, frozenset())
            if ids is None or folder.name in self._begun or folder.name in self._dropped or displaced(folder):
                continue
            for chunk_id, path in files_in(folder):
                if chunk_id >= below:
                    continue
                if path.suffix != SUFFIX:
                    with suppress(OSError):
                        path.unlink()
                elif chunk_id not in ids:
                    yield folder.name, chunk_id, path

    def remove_empty(self, known: Callable[[], Known]) -> list[Path]:
        """Remove the folders of unknown banks that have no payloads, and return those that have some."""
        folders = banks_in(self._data)
        rows = known()
        left = []
        for folder in folders:
            if folder.name in rows or folder.name in self._begun:
                continue
            if any(True for _ in files_in(folder)):
                left.append(folder)
            else:
                self._remove_folder(folder)
        return left

    def _sync(self, folder: Path) -> None:
        if self._durable:
            sync_folder(folder)
