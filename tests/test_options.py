"""What a loader may be asked for; each refusal says which number is wrong and what it must be."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from hdcache.errors import UsageError
from hdcache.options import Options
from hdcache.photometric import Photometric
from hdcache.schema import Preprocessing

SHOWN = Preprocessing(size=32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "^batch_size 0 must be at least 1$"),
        ({"world": 0}, "^world 0 must be at least 1$"),
        ({"threads": 0}, "^threads 0 must be at least 1$"),
        ({"prefetch": 0}, "^prefetch 0 must be at least 1$"),
        ({"buffer_rows": 0}, "^buffer_rows 0 must be at least 1$"),
        ({"rank": 2, "world": 2}, "^rank 2 must lie between 0 and 1: the processes are 2$"),
        ({"rank": -1}, "^rank -1 must lie between 0 and 0: the processes are 1$"),
        ({"batch_size": 3, "world": 4}, "^batch size 3 is smaller than the 4 processes that share it$"),
        ({"fresh": 2}, "^1 augmentations for 2 student views; give one for each$"),
        ({"augment": (None, None)}, "^2 augmentations for 1 student views; give one for each$"),
        ({"augment": ()}, "^0 augmentations for 1 student views; give one for each$"),
    ],
)
def test_options_that_cannot_be_meant(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Options(**({"batch_size": 8, "preprocessing": SHOWN} | fields))


@pytest.mark.parametrize("fresh", [0, 1, 2, 3])
def test_every_student_view_has_its_augmentation(fresh: int) -> None:
    """Without fresh views there is one: the view that the teachers saw."""
    jitter = (Photometric(), *[None] * (max(1, fresh) - 1))
    assert Options(batch_size=8, preprocessing=SHOWN, fresh=fresh, augment=jitter).augment == jitter


def test_options_do_not_change() -> None:
    options = Options(batch_size=8, preprocessing=SHOWN)
    with pytest.raises(FrozenInstanceError):
        options.seed = 1  # type: ignore[misc]
