"""`python -m normfree`."""

from normfree.cli import main

main()
