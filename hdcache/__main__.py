"""``python -m hdcache``: what torchrun starts."""

from hdcache.cli import main

main()
