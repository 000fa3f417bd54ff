"""The check of a store, or of a backup, wherever it is. This file owns the choice."""

from memory_service.care import check as folder_check
from memory_service.care import kept
from memory_service.care.copying import places
from memory_service.care.copying.places import Place
from memory_service.care.report import CareError, Findings, Progress, quiet
from memory_service.storage.opening import extras_named


def check(place: Place, *, fast: bool = False, sample: int = 0, progress: Progress = quiet) -> Findings:
    """Find every problem of a store, or of a backup; see `check`, `store_check` and `backup_check`. Errors: CareError,
    StartError, OSError."""
    if kept.in_bucket(place.data) and not (place.objects or sample):
        with extras_named():
            from memory_service.care import backup_check
        return backup_check.check(place.data, fast=fast, progress=progress)
    places.check(place, "--objects")
    if not place.in_database:
        if sample:
            raise CareError("--sample is for data in a database; of a folder all is read, or nothing with --fast")
        return folder_check.check(place.folder, fast=fast, progress=progress)
    with extras_named():
        from memory_service.care import store_check
    return store_check.check(place, fast=fast, sample=sample, progress=progress)
