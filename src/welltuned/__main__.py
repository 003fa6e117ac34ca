"""`python -m welltuned`, and `torchrun -m welltuned`."""

from welltuned.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
