"""The doctor finds what is wrong, and says what to do."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from hdcache import doctor


def test_a_good_installation_has_no_problems() -> None:
    findings = doctor.examine()
    assert findings["good"], findings["problems"]
    assert doctor.format_findings(findings).endswith("all good")


def test_a_missing_package_is_a_problem_with_its_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A needed package is a problem; an optional one only names its extra."""

    def version(name: str) -> str:
        if name in ("timm", "datasets"):
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(doctor, "version", version)
    findings = doctor.examine()
    assert findings["problems"] == ["timm is not installed: pip install --upgrade hdcache"]
    text = doctor.format_findings(findings)
    assert "problem: timm is not installed" in text
    assert "pip install 'hdcache[hf]'" in text


def test_a_broken_codec_is_found_by_a_real_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that come back changed are reported."""
    monkeypatch.setattr(doctor.ShardWriter, "encode", lambda self, shard, block: b"nonsense")
    findings = doctor.examine()
    assert not findings["good"]
    assert "does not survive writing and reading" in findings["problems"][0]
