"""Layouts: the dense expansion is the mask function, lists and map say the same, selections keep their promises."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastgen.ops.block_sparse_attention import layout as layout_module
from fastgen.ops.block_sparse_attention import selection as selection_module
from fastgen.ops.block_sparse_attention.layout import (
    BlockLayout,
    dense_layout,
    expand,
    lists_to_map,
    static_layout,
)
from fastgen.ops.block_sparse_attention.patterns import Radial, SlidingTile, TileGrid
from fastgen.ops.block_sparse_attention.selection import (
    Mass,
    TopK,
    kept_tiles,
    mass_map,
    pool,
    pooled_scores,
    scores_without_gradient,
    tiles_touched,
    top_k_map,
)
from fastgen.ops.block_sparse_attention.static_layouts import (
    VideoMask,
    causal_layout,
    rollout_layout,
    slots_layout,
    teacher_forcing_layout,
)
from fastgen.ops.block_sparse_attention.tiles import MAX_CAPACITY, Tiles, tile_tokens

CPU = torch.device("cpu")
VIDEOS = [
    VideoMask(frame_tokens=11, chunk_frames=(3, 2, 2)),
    VideoMask(frame_tokens=11, chunk_frames=(3, 3, 3, 3), window=6),
    VideoMask(frame_tokens=20, chunk_frames=(1, 2, 2, 2), window=4, sink=1),
    VideoMask(frame_tokens=7, chunk_frames=(3, 3, 3), window=8, sink=2),
    VideoMask(frame_tokens=7, chunk_frames=(2, 2), window=3, sink=1),
]


def every_pair(queries: int, keys: int) -> tuple[Tensor, Tensor]:
    return torch.arange(queries)[:, None], torch.arange(keys)[None, :]


def check_lists(layout: BlockLayout) -> None:
    """Both lists expand to the map; full tiles come first, ascending each."""
    transposed = layout.block_map.transpose(2, 3)
    for lists, tiles, kept in (
        (layout.key_lists, layout.k_tiles, layout.block_map),
        (layout.query_lists, layout.q_tiles, transposed),
    ):
        assert torch.equal(lists_to_map(lists, tiles), kept)
        for entries, count, full in zip(
            lists.entries.flatten(0, 2), lists.counts.flatten(), lists.full.flatten(), strict=True
        ):
            listed = entries[:count].tolist()
            lengths = [entry % MAX_CAPACITY + 1 for entry in listed]
            assert all((length == tiles.capacity) == (i < full) for i, length in enumerate(lengths))
            assert listed[:full] == sorted(listed[:full]) and listed[full:] == sorted(listed[full:])


@pytest.mark.parametrize("video", VIDEOS, ids=str)
def test_causal_layouts_expand_to_their_mask(video: VideoMask) -> None:
    layout = causal_layout(video, 16)
    assert torch.equal(layout.mask()[0, 0], video.causal(*every_pair(video.num_tokens, video.num_tokens)))
    check_lists(layout)


@pytest.mark.parametrize("video", VIDEOS, ids=str)
def test_teacher_forcing_layouts_expand_to_their_mask(video: VideoMask) -> None:
    layout = teacher_forcing_layout(video, 16)
    tokens = 2 * video.num_tokens
    assert torch.equal(layout.mask()[0, 0], video.teacher_forcing(*every_pair(tokens, tokens)))
    check_lists(layout)


def visible_frames(video: VideoMask, chunk: int) -> set[int]:
    """The rule in words, frame by frame: the sink, and the last W - S frames up to the end of the chunk."""
    end = sum(video.chunk_frames[: chunk + 1])
    moving = end if video.window is None else video.window - video.sink
    return {frame for frame in range(end) if frame < video.sink or frame >= end - moving}


@pytest.mark.parametrize("video", VIDEOS, ids=str)
def test_masks_are_the_rule_in_words(video: VideoMask) -> None:
    """Causal, teacher-forced and rolled-out queries of a chunk see the same frames, no more than the window's."""
    size, tokens = video.frame_tokens, video.num_tokens
    causal = causal_layout(video, 16).mask()[0, 0]
    forced = teacher_forcing_layout(video, 16).mask()[0, 0]
    for chunk, frames in enumerate(video.chunk_frames):
        visible = visible_frames(video, chunk)
        assert video.window is None or len(visible) <= video.window
        first = sum(video.chunk_frames[:chunk])
        expected = torch.tensor([key // size in visible for key in range(tokens)])
        own = torch.arange(tokens) // size >= first
        rows = slice(first * size, (first + frames) * size)
        assert (causal[rows] == expected).all()
        assert (forced[rows] == torch.cat([expected, torch.zeros(tokens, dtype=torch.bool)])).all()
        noisy = forced[tokens + rows.start : tokens + rows.stop]
        assert (noisy == torch.cat([expected & ~own, expected & own])).all()
        rollout = rollout_layout(video, chunk, 16)
        assert (rollout.mask()[0, 0] == expected[: rows.stop]).all()
        assert rollout.q_tiles.num_tokens == frames * size
        check_lists(rollout)


def test_a_rolling_cache_is_seen_where_its_slots_are() -> None:
    layout = slots_layout(20, [(0, 7), (30, 48)], slots=50, capacity=16)
    expected = torch.tensor([key < 7 or 30 <= key < 48 or key >= 50 for key in range(70)])
    assert (layout.mask()[0, 0] == expected).all() and layout.density == 1 and not layout.sees_all
    check_lists(layout)
    assert slots_layout(20, [], slots=0, capacity=16).sees_all
    with pytest.raises(ValueError, match="leave it out"):
        slots_layout(20, [], slots=8, capacity=16)


GRIDS = [TileGrid((4, 6, 6), (2, 3, 2)), TileGrid((3, 5, 7), (2, 2, 4)), TileGrid((5, 4, 4), (1, 4, 4))]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_sliding_tiles_expand_to_their_mask(grid: TileGrid) -> None:
    pattern = SlidingTile(grid, (3, 1, 3))
    layout = pattern.layout()
    tokens = math.prod(grid.grid)
    assert torch.equal(layout.mask()[0, 0], pattern.mask(*every_pair(tokens, tokens)))
    check_lists(layout)


def test_a_sliding_window_keeps_its_width_at_the_edges() -> None:
    """By coordinates: each query cuboid sees exactly 3 x 1 x 3 cuboids around the nearest centre that fits."""
    grid = TileGrid((5, 3, 8), (1, 1, 2))
    layout = SlidingTile(grid, (3, 1, 3)).layout()
    assert (layout.block_map.sum(-1) == 9).all()
    cuboids = list(itertools.product(*map(range, grid.num_tiles)))
    for query, key in itertools.product(range(len(cuboids)), repeat=2):
        (qf, qr, qc), (kf, kr, kc) = cuboids[query], cuboids[key]
        near = abs(min(max(qf, 1), 3) - kf) <= 1 and qr == kr and abs(min(max(qc, 1), 2) - kc) <= 1
        assert bool(layout.block_map[0, 0, query, key]) == near
    with pytest.raises(ValueError, match="window must be odd"):
        SlidingTile(grid, (2, 1, 3))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_token_order_puts_each_cuboid_together(grid: TileGrid) -> None:
    tokens = torch.arange(math.prod(grid.grid))
    ordered = tokens[grid.order()]
    assert torch.equal(ordered[grid.inverse()], tokens)
    cuboid = grid.coordinates()[ordered]
    tiles = grid.tiles()
    for start, length in zip(tiles.starts, tiles.lengths, strict=True):
        assert (cuboid[start : start + length] == cuboid[start]).all()
    assert len(tiles) == math.prod(grid.num_tiles) == len(cuboid.unique(dim=0)) and tiles.covers_all


@pytest.mark.parametrize(
    "pattern", [Radial(9, 70, 16), Radial(6, 32, 16, decay=0.5), Radial(20, 24, 16, sink=False)], ids=str
)
def test_radial_layouts_expand_to_their_mask(pattern: Radial) -> None:
    layout = pattern.layout()
    tokens = pattern.frames * pattern.frame_tokens
    assert torch.equal(layout.mask()[0, 0], pattern.mask(*every_pair(tokens, tokens)))
    assert (layout.block_map.any(-1)).all()
    check_lists(layout)


def test_radial_bands_halve_with_each_octave() -> None:
    """64 tokens a frame in tiles of 16. Distance 1: all 4 x 4 tiles. 2 and 3: width 32, |a - b| <= 1. 4 to 7: width
    16, the diagonal. 8 to 15: width 8, the diagonal of every second pair of frames."""
    block_map = Radial(frames=16, frame_tokens=64, capacity=16, sink=False).layout().block_map[0, 0]
    pairs = block_map.view(16, 4, 16, 4).transpose(1, 2)
    place = torch.arange(4)
    apart = (place[:, None] - place).abs()
    wanted = {1: apart < 9, 3: apart <= 1, 6: apart == 0, 10: apart == 0, 11: apart < 0}
    for distance, expected in wanted.items():
        assert torch.equal(pairs[2, 2 + distance], expected) and torch.equal(pairs[2 + distance, 2], expected), (
            distance
        )
    assert Radial(16, 64, 16).layout().block_map[0, 0, :, :4].all()


def test_tiles_refuse_what_they_cannot_hold() -> None:
    for starts, lengths, capacity, words in (
        ((0,), (17,), 16, "must hold 1 to 16"),
        ((0,), (0,), 16, "must hold 1 to 16"),
        ((0, 15), (16, 5), 16, "without overlap"),
        ((0, 30), (16, 11), 16, "inside 40 tokens"),
        ((0,), (16,), 48, "capacity must be"),
        ((), (), 16, "at least one"),
    ):
        with pytest.raises(ValueError, match=words):
            Tiles(starts, lengths, capacity, 40)
    with pytest.raises(ValueError, match="cannot be joined"):
        tile_tokens(20, 16).followed_by(tile_tokens(20, 32))
    with pytest.raises(ValueError, match="block_map is"):
        BlockLayout(torch.ones(1, 1, 2, 2, dtype=torch.bool), tile_tokens(20, 16), tile_tokens(40, 16))
    with pytest.raises(ValueError, match="cannot hold 1 sink frames and a chunk of 3"):
        VideoMask(10, (3, 3), window=3, sink=1)


def test_rows_of_no_tile_are_hidden() -> None:
    tiles = Tiles((2, 20), (5, 16), 16, 40)
    mask = expand(torch.ones(1, 1, 2, 2, dtype=torch.bool), tiles, tiles)[0, 0]
    held = torch.tensor([2 <= row < 7 or 20 <= row < 36 for row in range(40)])
    assert torch.equal(mask, held[:, None] & held)


def test_pooling_takes_means_of_real_tokens_only() -> None:
    tokens = torch.randn(2, 40, 3, 4, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    for tiles in (Tiles((2, 20), (5, 16), 16, 40), tile_tokens(40, 16)):
        poisoned = tokens.clone()
        poisoned[:, :2] = torch.nan if tiles.starts[0] else poisoned[:, :2]
        means = [tokens[:, s : s + n].mean(1) for s, n in zip(tiles.starts, tiles.lengths, strict=True)]
        assert torch.allclose(pool(poisoned, tiles), torch.stack(means, 2), atol=1e-14)
        (gradient,) = torch.autograd.grad(pool(poisoned, tiles).sum(), tokens)
        expected = torch.autograd.grad(torch.stack(means, 2).sum(), tokens)[0]
        assert torch.allclose(gradient, expected, atol=1e-14)


def random_scores(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 5, 12, generator=torch.Generator().manual_seed(seed))


def test_top_k_keeps_the_forced_tiles_and_the_k_best_others() -> None:
    scores = random_scores()
    forced = tiles_touched(tile_tokens(120, 16, tuple(range(10, 120, 10))), ((0, 11), (115, 116)), CPU)
    assert forced.flatten().nonzero().flatten().tolist() == [0, 1, 11]
    kept = top_k_map(scores, 3, forced)
    assert (kept.sum(-1) == 6).all() and kept[..., [0, 1, 11]].all()
    others = scores[..., 2:11]
    worst_kept = others.masked_fill(~kept[..., 2:11], math.inf).amin(-1)
    assert (others.masked_fill(kept[..., 2:11], -math.inf).amax(-1) < worst_kept).all()
    assert torch.equal(top_k_map(scores, 0, forced), forced.expand(scores.shape))
    assert top_k_map(scores, 99).all()


def test_selection_keeps_to_what_is_allowed() -> None:
    scores = random_scores()
    allowed = torch.ones(5, 12).tril(4).bool()
    for kept in (top_k_map(scores, 8, allowed=allowed), mass_map(scores, 0.9, allowed=allowed)):
        assert not (kept & ~allowed).any()
    assert torch.equal(top_k_map(scores, 8, allowed=allowed).sum(-1)[0, 0], allowed.sum(-1).clamp(max=8))
    assert not top_k_map(scores, 2, allowed=torch.zeros(12, dtype=torch.bool)).any()
    assert not mass_map(scores, 0.5, allowed=torch.zeros(12, dtype=torch.bool)).any()


@pytest.mark.parametrize("mass", [0.3, 0.8, 1.0])
def test_cumulative_mass_is_the_smallest_set(mass: float) -> None:
    """By brute force: no smaller set that holds the forced tiles has the mass."""
    scores = random_scores(1)[:1, :1, :, :8].double()
    forced = torch.zeros(1, 1, 1, 8, dtype=torch.bool)
    forced[..., 3] = True
    kept = mass_map(scores, mass, forced)
    assert kept[..., 3].all()
    for row, chosen in zip(scores[0, 0].softmax(-1), kept[0, 0], strict=True):
        sizes = [
            1 + size
            for size in range(8)
            for rest in itertools.combinations([0, 1, 2, 4, 5, 6, 7], size)
            if row[[3, *rest]].sum() >= mass - 1e-12
        ]
        assert int(chosen.sum()) == min(sizes) and row[chosen].sum() >= mass - 1e-12
    assert (mass_map(scores, 1e-9).sum(-1) == 1).all()


def test_ties_go_to_the_lower_tile_and_selection_is_deterministic() -> None:
    kept = top_k_map(torch.zeros(1, 1, 2, 6), 2)
    assert torch.equal(kept[0, 0, 0], torch.tensor([1, 1, 0, 0, 0, 0], dtype=torch.bool))
    assert torch.equal(mass_map(torch.zeros(1, 1, 1, 4), 0.5)[0, 0, 0], torch.tensor([1, 1, 0, 0], dtype=torch.bool))
    scores = random_scores().round()
    assert torch.equal(top_k_map(scores, 4), top_k_map(scores.clone(), 4))


def test_a_common_key_does_not_change_a_selection() -> None:
    """SLA subtracts the mean key; the rankings here do not need it."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 64, 2, 8, generator=generator).double() for _ in range(2))
    tiles = tile_tokens(64, 16)
    rules = (TopK(tiles, tiles, 2), Mass(tiles, tiles, 0.6))
    for rule in rules:
        assert torch.equal(rule(query, key).block_map, rule(query, key - key.mean(1, keepdim=True)).block_map)
    scores = pooled_scores(query, key, tiles, tiles)
    means = [tensor.view(1, 4, 16, 2, 8).mean(2) for tensor in (query, key)]
    assert torch.allclose(scores, torch.einsum("bqhd,bkhd->bhqk", *means) / 8**0.5)


def test_selected_layouts_are_built_without_a_host_sync() -> None:
    """On the meta device there are no values: anything that needs one on the host raises."""
    query = torch.empty(1, 200, 2, 64, device="meta")
    uniform, ragged = tile_tokens(200, 32), tile_tokens(200, 32, (70,))
    for tiles in (uniform, ragged):
        for rule in (TopK(tiles, tiles, 2, forced=((0, 5),)), Mass(tiles, tiles, 0.5)):
            layout = rule(query, query)
            assert layout.key_lists.entries.shape == (1, 2, len(tiles), len(tiles))
            assert layout.query_lists.counts.shape == (1, 2, len(tiles))
    with pytest.raises(RuntimeError):
        layout.block_map.sum().item()


def test_the_density_of_a_layout_is_known_where_it_can_be() -> None:
    tiles = tile_tokens(160, 16)
    assert TopK(tiles, tiles, 3, forced=((0, 17),)).density == 0.5
    assert Mass(tiles, tiles, 0.5).density is None
    assert dense_layout(tiles, tiles).sees_all
    assert static_layout(torch.eye(10, dtype=torch.bool), tiles, tiles).density == pytest.approx(0.1)
    assert kept_tiles(0.8, tiles) == 2 and kept_tiles(0.81, tiles) == 2 and kept_tiles(1.0, tiles) == 1


PAIR = tile_tokens(20, 16), tile_tokens(111, 16, (20, 50))
RULES = [
    TopK(*PAIR, 3),
    TopK(*PAIR, 0, forced=((0, 21),)),
    TopK(*PAIR, 99),
    Mass(*PAIR, 0.6),
    Mass(*PAIR, 1e-9),
    Mass(*PAIR, 0.9, forced=((0, 21), (100, 101))),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{type(rule).__name__} {rule.density}")
def test_selection_kernels_equal_torch(rule: TopK | Mass, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores to rounding; maps and lists exactly, also where scores are tied, or -0 and 0."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, length, 1, 64, generator=generator).to(device) for length in (20, 111))

    def outcome(scores: Tensor, by_kernel: bool) -> list[Tensor]:
        """The scores, and the map and lists of the given ones."""
        for module in (layout_module, selection_module):
            monkeypatch.setattr(module, "kernels_run_on", lambda device: by_kernel)
        layout = rule.from_scores(scores)
        own = scores_without_gradient(query, key, rule.q_tiles, rule.k_tiles)
        return [own, layout.block_map, *layout.key_lists, *layout.query_lists]

    scores = outcome(torch.zeros(1, 1, len(rule.q_tiles), len(rule.k_tiles), device=device), by_kernel=False)[0]
    for given in (scores, (8 * scores).round()):
        (one, *chosen), (other, *expected) = outcome(given, by_kernel=True), outcome(given, by_kernel=False)
        assert torch.allclose(one, other, atol=1e-5) and one.any()
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(chosen, expected, strict=True))
