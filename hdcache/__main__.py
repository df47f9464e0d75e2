"""``python -m hdcache``: what torchrun starts."""

from hdcache.cli import main

if __name__ == "__main__":
    main()
