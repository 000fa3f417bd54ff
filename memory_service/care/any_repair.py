"""The repair of a store wherever it is. This file owns the choice between that of a folder and that of a database."""

from memory_service.care import repair as folder_repair
from memory_service.care.copying import places
from memory_service.care.copying.places import Place
from memory_service.care.repair import Repaired
from memory_service.care.report import Progress, quiet
from memory_service.storage.opening import extras_named


def repair(place: Place, *, dry_run: bool = False, progress: Progress = quiet) -> Repaired:
    """Mend what a check finds; see `repair` and `database_repair`. Errors: CareError, StartError, OSError."""
    places.check(place, "--objects")
    if not place.in_database:
        return folder_repair.repair(place.folder, dry_run=dry_run, progress=progress)
    with extras_named():
        from memory_service.care import database_repair
    return database_repair.repair(place, dry_run=dry_run, progress=progress)
