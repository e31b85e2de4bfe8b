"""What no stage depends on: stores are listed, verified, exported, and freed of what nobody uses."""
