"""Student -> numbers. Open run.py first."""

from __future__ import annotations

if __name__ != "hdcache.evaluate":
    raise ImportError(
        "this folder is the package hdcache.evaluate, not a top-level module: "
        "run 'pip install -e .' in the checkout and 'import hdcache.evaluate' (or start Python with -P)"
    )
