"""One module per command; only src/cli.py imports them."""
