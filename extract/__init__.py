"""Teacher -> store. Open run.py first."""

from __future__ import annotations

if __name__ != "hdcache.extract":
    raise ImportError(
        "this folder is the package hdcache.extract, not a top-level module: "
        "run 'pip install -e .' in the checkout and 'import hdcache.extract' (or start Python with -P)"
    )
