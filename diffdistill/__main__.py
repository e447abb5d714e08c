"""`python -m diffdistill` is `diffdistill`."""

from .cli import entry

if __name__ == "__main__":
    entry()
