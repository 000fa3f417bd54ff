"""A flipped bit serves nothing wrong, gives no id twice and deletes nothing that was acknowledged."""

from pathlib import Path

from tests.proof.flips import PLACES, flip_often, prepare
from tests.support.service_process import ServiceHost

FLIPS = len(PLACES)


def test_a_flipped_bit_anywhere_costs_at_most_what_it_is_in(host: ServiceHost, tmp_path: Path) -> None:
    flipped = flip_often(host, prepare(host, tmp_path), FLIPS, seed=7)
    assert flipped.bad == [], flipped
    assert all(flipped.seen[name] == 1 for name in PLACES)
