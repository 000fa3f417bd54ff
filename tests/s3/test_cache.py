"""The cache of payloads on a disk: never beyond its bound, the least lately used goes first, one process at a time."""

import os
import subprocess
import sys

import pytest

from memory_service.domain.errors import FolderInUse
from memory_service.storage.s3.cache import Key, PayloadCache

BLOCK = 4096


@pytest.fixture
def cache_of(tmp_path):
    """Open a cache of so many blocks in the folder of the test."""
    made = []

    def open_cache(blocks):
        made.append(PayloadCache(tmp_path / "cache", blocks * BLOCK))
        return made[-1]

    yield open_cache
    for cache in made:
        cache.close()


def key(chunk_id, parts="a", bank="b"):
    return Key(bank, chunk_id, parts)


def fill(cache, name, size=BLOCK):
    new = cache.begin(name, size)
    os.write(new.descriptor, bytes([name.chunk_id]) * size)
    new.keep()
    new.close()


def held(cache, names):
    """Return those of the chunks that the cache has, without using them."""
    return [name.chunk_id for name in names if cache.has(name)]


def use(cache, name):
    descriptor = cache.open(name)
    assert os.read(descriptor, 1) == bytes([name.chunk_id])
    os.close(descriptor)


def on_disk(tmp_path):
    return sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.*") if file.suffix != ".lock")


def test_the_least_lately_used_goes_also_over_a_restart(cache_of, tmp_path):
    names = [key(n) for n in range(1, 6)]
    cache = cache_of(3)
    for name in names[:3]:
        fill(cache, name)
    use(cache, names[0])
    fill(cache, names[3])
    assert held(cache, names) == [1, 3, 4]
    use(cache, names[2])
    cache.close()
    again = cache_of(3)
    assert held(again, names) == [1, 3, 4]
    fill(again, names[4])
    assert held(again, names) == [3, 4, 5]
    again.close()
    assert held(cache_of(1), names) == [5]
    assert on_disk(tmp_path) == BLOCK


def test_the_bound_holds_while_files_are_written(cache_of, tmp_path):
    cache = cache_of(4)
    fill(cache, key(1), 2 * BLOCK)
    first, second = cache.begin(key(2), 2 * BLOCK), cache.begin(key(3), 2 * BLOCK)
    assert held(cache, [key(1)]) == []
    beyond = cache.begin(key(4), 1)
    assert cache.used() == 4 * BLOCK
    beyond.keep()
    beyond.close()
    first.close()
    second.keep()
    second.close()
    second.close()
    assert held(cache, [key(n) for n in range(1, 5)]) == [3]
    assert cache.used() == 2 * BLOCK
    fill(cache, key(5), 5 * BLOCK)
    assert held(cache, [key(3), key(5)]) == [3]
    assert not cache.has_room_for(5 * BLOCK)


def test_small_files_count_as_what_they_take_of_a_disk(cache_of):
    cache = cache_of(2)
    for n in (1, 2, 3):
        fill(cache, key(n), 10)
    assert held(cache, [key(n) for n in (1, 2, 3)]) == [2, 3]


def test_the_parts_of_a_chunk_go_together(cache_of):
    cache = cache_of(4)
    fill(cache, key(1, "a"))
    fill(cache, key(1, "c"))
    fill(cache, key(2))
    fill(cache, key(1, "a"))
    assert cache.used() == 3 * BLOCK
    cache.purge("b", [1, 9])
    assert held(cache, [key(1, "a"), key(1, "c"), key(2)]) == [2]
    fill(cache, key(3, bank="other"))
    cache.purge("b")
    assert cache.used() == BLOCK
    cache.drop(key(3, bank="other"))
    cache.drop(key(3, bank="other"))
    assert cache.used() == 0


def test_what_a_kill_has_left_goes_at_the_start(cache_of, tmp_path):
    cache = cache_of(4)
    fill(cache, key(1))
    new = cache.begin(key(2), BLOCK)
    os.write(new.descriptor, b"half")
    cache.close()
    (tmp_path / "cache" / "empty").mkdir()
    again = cache_of(4)
    assert [path.name for path in sorted((tmp_path / "cache").rglob("*"))] == ["b", "1.a", "payloads.lock"]
    assert again.used() == BLOCK
    os.close(new.descriptor)


def test_one_process_has_the_folder(cache_of, tmp_path):
    cache = cache_of(4)
    fill(cache, key(1))
    with pytest.raises(FolderInUse, match="is used by another process; name another folder"):
        cache_of(4)
    cache.close()
    # A process that was killed leaves no lock behind.
    script = "import os, sys; from pathlib import Path; from memory_service.storage.s3.cache import PayloadCache; "
    script += "PayloadCache(Path(sys.argv[1]), 4096); os._exit(0)"
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "cache")], check=True, timeout=60)
    use(cache_of(4), key(1))


def test_files_are_their_owners_alone(cache_of, tmp_path):
    fill(cache_of(4), key(1))
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "cache").rglob("*"))
