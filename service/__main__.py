"""`python -m service` is `tailstream`."""

from service.cli import main

main()
