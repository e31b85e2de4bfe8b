"""Entry point of the `xkd-pipeline` command."""

from pipeline import interrupts

if interrupts.is_command_line(__name__):  # before the imports below, which take seconds
    interrupts.install()

from pipeline.cli.app import main

if __name__ == "__main__":
    main()
