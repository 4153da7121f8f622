"""`python -m splaser_plugin` is the command `splaser`."""

from splaser_plugin.cli.app import main

if __name__ == "__main__":
    main()
