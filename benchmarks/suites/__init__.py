"""One module per named suite; each defines `SUITE`."""
