"""Which of the teacher's tokens the student sees, and the generators that make the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hdcache.distill.amd_heads import Counts, Generator, projection, split_visible
from hdcache.distill.decoder import sincos_positions
from hdcache.distill.objective import Layout
from hdcache.masks import draw_visible
from hdcache.schema import MaskSpec
from hdcache.video_vit import sinusoid_positions

IDS = ["a", "b", "c"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generator(clips: bool = False, train: bool = False, seed: int = 0) -> Generator:
    layout = Layout((3, 3), 0, 16, 2 if clips else 1)
    made = Generator(layout, 2, 2, torch.Generator().manual_seed(seed), clips=clips, train_mask_token=train)
    return made.eval()


counts = st.builds(
    lambda among, share, slots: Counts(among, max(1, round(share * among)), slots),
    st.integers(1, 30), st.floats(0, 1), st.integers(1, 4),
)  # fmt: skip


# The split


@given(counts, st.integers(0, 2**31), st.integers(0, 500))
def test_the_student_sees_a_part_of_what_the_teacher_sees(how: Counts, seed: int, epoch: int) -> None:
    """For every seed and epoch: V and F are disjoint, together all positions, ascending, of fixed size."""
    split = split_visible(IDS, epoch, seed, how)
    assert split.seen.shape == (3, how.seen * how.slots)
    assert split.unseen.shape == (3, (how.among - how.seen) * how.slots)
    both, _ = torch.cat(split, dim=1).sort(dim=1)
    assert torch.equal(both, torch.arange(how.among * how.slots).expand(3, -1))
    for part in split:
        assert (part.diff(dim=1) > 0).all()


@given(st.integers(2, 9), st.integers(1, 4), st.integers(0, 99))
def test_a_tube_split_takes_the_same_cells_in_every_slot(cells: int, slots: int, epoch: int) -> None:
    """Seen through the teacher's own tube mask."""
    mask = MaskSpec(kind="tube", ratio=0.5)
    visible = torch.from_numpy(draw_visible(mask, IDS, 0, cells, slots))
    among = visible.shape[1] // slots
    split = split_visible(IDS, epoch, 0, Counts(among, max(1, among // 2), slots))
    for part in split:
        chosen = visible.gather(1, part).reshape(3, slots, -1)
        assert torch.equal(chosen % cells, (chosen[:, :1] % cells).expand_as(chosen))
        assert torch.equal(chosen // cells, torch.arange(slots).view(1, -1, 1).expand_as(chosen))


def test_the_split_is_a_function_of_seed_id_and_epoch() -> None:
    how = Counts(40, 20, 1)
    first = split_visible(["a", "b"], 3, 7, how).seen
    assert torch.equal(split_visible(["b", "a"], 3, 7, how).seen, first.flip(0))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(split_visible(["a", "b"], 4, 7, how).seen, first)
    assert not torch.equal(split_visible(["a", "b"], 3, 8, how).seen, first)


def test_every_token_is_seen_equally_often() -> None:
    seen = split_visible([str(i) for i in range(4000)], 0, 0, Counts(10, 4, 1)).seen
    shares = np.bincount(seen.flatten().numpy(), minlength=10) / 4000
    assert np.abs(shares - 0.4).max() < 0.04


def test_symmetric_masks_leave_none() -> None:
    split = split_visible(IDS, 0, 0, Counts(5, 5, 2))
    assert torch.equal(split.seen, torch.arange(10).expand(3, -1))
    assert split.unseen.shape == (3, 0)


# The generator


def test_generator_is_two_blocks_on_projected_tokens_and_mask_tokens() -> None:
    made, direct = generator(), normal(1, 3, 16)
    seen, unseen = torch.tensor([[0, 4, 7]]), torch.tensor([[1, 8]])
    positions = sincos_positions(16, (3, 3))
    x = torch.cat([direct + positions[seen[0]], made.mask_token + positions[unseen[0]]], dim=1)
    for block in made.blocks:
        x = block(x)
    # No norm after the last block.
    torch.testing.assert_close(made(direct, seen, unseen), x[:, 3:])


def test_positions_of_clips_are_on_the_flattened_index() -> None:
    assert torch.equal(generator(clips=True).get_buffer("positions"), sinusoid_positions(18, 16))


@given(st.permutations([1, 3, 6, 8]))
def test_generated_tokens_do_not_depend_on_one_another_s_order(order: list[int]) -> None:
    """Each generated token is a function of V, of the set F and of its own position."""
    made, direct, seen = generator(), normal(1, 2, 16), torch.tensor([[0, 4]])
    with torch.no_grad():
        ascending = made(direct, seen, torch.tensor([sorted(order)]))
        shuffled = made(direct, seen, torch.tensor([order]))
    back = torch.tensor([sorted(order).index(at) for at in order])
    torch.testing.assert_close(shuffled, ascending[:, back], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("train", [False, True])
def test_mask_tokens_are_saved_and_trained_only_where_asked(train: bool) -> None:
    made = generator(train=train)
    assert ("mask_token" in dict(made.named_parameters())) == train
    assert "mask_token" in made.state_dict()
    assert "positions" not in made.state_dict()
    assert 0.005 < float(made.mask_token.detach().abs().max()) <= 0.02
    # The same on every rank: drawn from the generator that is given, whether it is trained or not.
    assert torch.equal(generator(train=not train).mask_token, made.mask_token)
    assert not torch.equal(generator(seed=1).mask_token, made.mask_token)


def test_the_global_generator_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    generator()
    layer = projection(6, 4, torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert layer.bias is None
    assert layer.weight.shape == (4, 6)
