from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from hdcache.stages import STAGES, Stages


def test_seconds_add_up_over_threads() -> None:
    stages = Stages()

    def work(_: int) -> None:
        with stages.of("read"):
            time.sleep(0.02)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))
    found = stages.seconds()
    assert list(found) == list(STAGES)
    assert found["read"] >= 8 * 0.02
    assert not any(seconds for name, seconds in found.items() if name != "read")


def test_a_stage_that_fails_is_counted_too() -> None:
    stages = Stages()

    def work() -> None:
        with stages.of("finish"):
            time.sleep(0.01)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        work()
    assert stages.seconds()["finish"] >= 0.01


def test_what_is_returned_is_a_copy() -> None:
    stages = Stages()
    stages.seconds()["read"] = 5
    assert stages.seconds()["read"] == 0


def test_what_another_counted_is_added() -> None:
    stages = Stages()
    stages.add({"read": 2.0, "finish": 1.0})
    stages.add({"read": 3.0})
    assert stages.seconds() == dict.fromkeys(STAGES, 0.0) | {"read": 5.0, "finish": 1.0}
