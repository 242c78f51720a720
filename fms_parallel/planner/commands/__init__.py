"""The commands of `fms-plan`, one file each: `add_arguments(parser)` and `run(args) -> exit code`."""
