"""Store -> student. Open run.py first."""

from __future__ import annotations

if __name__ != "hdcache.distill":
    raise ImportError(
        "this folder is the package hdcache.distill, not a top-level module: "
        "run 'pip install -e .' in the checkout and 'import hdcache.distill' (or start Python with -P)"
    )
