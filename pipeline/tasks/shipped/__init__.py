"""The tasks that ship, each with what makes or checks it; `pipeline.tasks` has the table and says how to add one."""
