"""Where a process of the `xkd-pipeline` command begins."""

from pipeline import interrupts

if interrupts.is_command_line(__name__):  # before the imports below, which take longer than somebody's second thought
    interrupts.install()

from pipeline.cli.app import main

if __name__ == "__main__":
    main()
