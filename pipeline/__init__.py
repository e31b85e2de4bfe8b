"""What every stage shares: parameters, tasks, teacher engines, the shard store, models, and the command line."""

__version__ = "0.1.0"
