"""Files as a store's records list them: by key, with size and sha256. A record may list hundreds of thousands."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from hdcache.records import Record, check_key

_SHA256 = re.compile(r"[0-9a-f]{64}")


class StoredObject(Record):
    """Size in bytes and sha256 of one file of the store."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


def _files(value: Any) -> Any:
    # All faults of a record would be collected, a kilobyte each; a hostile one has hundreds of thousands.
    for key, entry in value.items() if isinstance(value, dict) else ():
        check_key(str(key))
        if not isinstance(entry, StoredObject) and not _is_listed(entry):
            raise ValueError(f"no size and sha256 of {key}")
    return value


def _is_listed(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"size", "sha256"}:
        return False
    size, sha256 = entry["size"], entry["sha256"]
    return isinstance(size, int) and size >= 0 and isinstance(sha256, str) and _SHA256.fullmatch(sha256) is not None


def _reasons(value: Any) -> Any:
    for row, reason in value.items() if isinstance(value, dict) else ():
        if not isinstance(reason, str) or not (isinstance(row, int) or row.removeprefix("-").isdecimal()):
            raise ValueError(f"no reason why row {str(row)[:40]!r} failed")
    return value


Objects = Annotated[dict[str, StoredObject], BeforeValidator(_files)]
"""Files by a key that cannot leave the folder it is relative to."""
Reasons = Annotated[dict[int, str], BeforeValidator(_reasons)]
"""Row -> why it failed."""
