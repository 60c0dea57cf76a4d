"""`python -m dimefm` is the `dimefm` command."""

from .cli import main

if __name__ == "__main__":
    main()
