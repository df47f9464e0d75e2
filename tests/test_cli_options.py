"""What commands share: here, that nothing they log holds a credential. Options are seen through the commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hdcache.index import write_index
from hdcache.store import Store
from travelling import KEY, SECRET, bucket_server

TOKEN = "FwoGZXIvYXdzEsessiontokenEXAMPLE"


def run(*arguments: str) -> str:
    """Everything that the command prints, at the level of debugging."""
    done = subprocess.run(
        [sys.executable, "-m", "hdcache", *arguments, "-vv"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_keys_of_the_environment_are_not_logged(sealed_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_index(Store.open(sealed_store))
    with bucket_server(monkeypatch):
        monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
        said = run("push", str(sealed_store), "s3://team/keys")
        said += run("pull", "s3://team/keys", str(sealed_store.parent / "copy"))
    assert said.count("copied") == 2
    assert SECRET not in said
    assert TOKEN not in said


def test_keys_that_are_received_are_not_logged(
    sealed_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A role's keys come in an answer, which botocore logs whole at the level of debugging."""
    pytest.importorskip("boto3")
    write_index(Store.open(sealed_store))
    config = tmp_path / "aws"
    config.write_text(
        f"[profile who]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\naws_session_token = {TOKEN}\n"
        "[profile role]\nrole_arn = arn:aws:iam::123456789012:role/reader\nsource_profile = who\nregion = us-east-1\n"
    )
    with bucket_server(monkeypatch) as url:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in {
            "PROFILE": "role",
            "CONFIG_FILE": config,
            "ENDPOINT_URL": url,
            "REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(f"AWS_{name}", str(value))
        said = run("push", str(sealed_store), "s3://team/role")
        debugging = subprocess.run(
            [
                sys.executable, "-c",
                "import logging; logging.basicConfig(level=10); import boto3; boto3.Session().get_credentials().get_frozen_credentials()",
            ],
            capture_output=True, text=True, timeout=120, check=True,
        ).stderr  # fmt: skip
    assert "SecretAccessKey" in debugging, "without care it would be there"
    for secret in (SECRET, TOKEN, "SecretAccessKey", "SessionToken"):
        assert secret not in said
