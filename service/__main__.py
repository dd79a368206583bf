"""`python -m service` is `tailstream`."""

from service.cli import main

if __name__ == "__main__":  # workers import it again
    main()
