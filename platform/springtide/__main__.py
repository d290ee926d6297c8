"""`python -m springtide` is the `springtide` command."""

from springtide.cli import main

if __name__ == "__main__":
    main()
