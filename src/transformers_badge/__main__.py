"""`python -m transformers_badge` is `transformers-badge`."""

from transformers_badge.cli import main


if __name__ == "__main__":
    main()
