"""How latent_moe_front and latent_moe_tail run on sm_90: who does what, by host code that the kernel compiles too."""

from __future__ import annotations

from collections import Counter

import pytest

_host = pytest.importorskip("n3kernels._host", reason="_host was built for another Python")

# width, experts, latent width (0: none), inner size of the shared expert
SUPER, NANO, ULTRA = (4096, 512, 1024, 5376), (2688, 128, 0, 3712), (8192, 512, 2048, 10240)
MODELS = [SUPER, NANO, ULTRA, (4096, 512, 1024, 672), (7168, 896, 3584, 3072)]
ODD = [(8, 1, 1, 1), (72, 0, 8, 130), (200, 65, 0, 8), (40000, 3, 64, 64)]


def front(tokens, model, router="float32", invariant=False):
    return _host.latent_front_plan(tokens, *model, router == "float32", invariant)


def tail(tokens, model, invariant=False):
    width, _, latent, inner = model
    return _host.latent_tail_plan(tokens, width, latent, inner, invariant)


@pytest.mark.parametrize("model", MODELS + ODD)
@pytest.mark.parametrize("plan", [front, tail])
def test_every_step_is_done_once(plan, model):
    for tokens in (0, 1, 8, 9, 64, 129, 512, 1000):
        (tile, *_, cluster, sections), places = plan(tokens, model)
        tiles_of_tokens = -(-tokens // tile)
        assert len(places) % cluster == 0
        seen = Counter()
        for section, row, token_tile, begin, end in places:
            tiles, steps, _ = sections[section]
            assert row >= 0 and 0 <= token_tile < tiles_of_tokens and 0 <= begin <= end <= steps
            if row < tiles:
                seen.update((section, row, token_tile, step) for step in range(begin, end))
        assert set(seen.values()) <= {1}
        assert len(seen) == tiles_of_tokens * sum(tiles * steps for tiles, steps, _ in sections)


@pytest.mark.parametrize("model", MODELS + ODD)
@pytest.mark.parametrize("plan", [front, tail])
def test_the_parts_of_a_tile_are_neighbours_in_a_cluster(plan, model):
    """In the order of their steps, from a multiple of their number on: so the kernel finds the first."""
    (*_, cluster, sections), places = plan(300, model)
    for first in range(0, len(places), cluster):
        section = places[first][0]
        parts = sections[section][2]
        assert cluster % parts == 0
        for at in range(first, first + cluster, parts):
            group = places[at : at + parts]
            assert len({place[:3] for place in group}) == 1 and group[0][0] == section
            assert group[0][3] == 0 and group[-1][4] == sections[section][1]
            assert all(a[4] == b[3] for a, b in zip(group, group[1:], strict=False))


@pytest.mark.parametrize("model", MODELS + ODD)
@pytest.mark.parametrize("plan", [front, tail])
def test_sums_depend_on_the_sizes_alone(plan, model):
    """Steps and parts are the same for any number of tokens and in either mode."""

    def cuts(tokens, invariant=False):
        return [section[1:] for section in plan(tokens, model, invariant=invariant)[0][-1]]

    for tokens in (2, 17, 100, 512, 4000):
        assert cuts(tokens) == cuts(1) == cuts(tokens, invariant=True)
    assert plan(1, model, invariant=True)[0][0] == plan(4000, model, invariant=True)[0][0] == 64


@pytest.mark.parametrize("tokens, tile", [(1, 8), (8, 8), (9, 16), (32, 32), (33, 64), (65, 128), (512, 128)])
def test_tiles_of_tokens(tokens, tile):
    """One or two blocks share the 228 KiB of a multiprocessor, where each takes one more KiB."""
    (got, rows, shared, stages, *_), _ = front(tokens, SUPER)
    assert got == tile and rows == (64 if tile < 64 else 128)
    blocks = 128 // rows
    assert blocks * (shared + 1024) <= 228 * 1024
    assert blocks * stages * rows * 128 >= 64 * 1024


@pytest.mark.parametrize("model", [SUPER, NANO, ULTRA])
@pytest.mark.parametrize("plan", [front, tail])
def test_one_token_keeps_the_memory_busy(plan, model):
    """All blocks at once, up to two per multiprocessor, and none much longer than the mean."""
    (*_, sections), places = plan(1, model)
    lengths = [end - begin for section, row, _, begin, end in places if row < sections[section][0]]
    assert 132 <= len(places) <= 264
    assert max(lengths) <= 1.05 * sum(lengths) / len(lengths)


def test_super():
    (*_, cluster, sections), places = front(1, SUPER)
    assert (cluster, sections, len(places)) == (4, [(8, 128, 4), (16, 64, 2), (84, 64, 2)], 232)
    (*_, cluster, sections), places = tail(1, SUPER)
    assert (cluster, sections[0], len(places)) == (4, (64, 100, 4), 256)
    assert [len(front(tokens, SUPER)[1]) for tokens in (8, 64, 512)] == [232, 116, 464]
